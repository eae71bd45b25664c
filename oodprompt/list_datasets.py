"""``oodprompt datasets``: the data sets that can be named, and the files that each expects."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Sequence

from oodprompt.config import extensions
from oodprompt.config.keys import declared_keys, section_of, sections_of
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.terminal import Parser, exit_status

DESCRIPTION = """List the data sets that DATASET.NAME takes; of one, the files that it expects under --root and its keys.

  oodprompt datasets              a line for each
  oodprompt datasets CSV          its files and keys
"""


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt datasets", description=DESCRIPTION)
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="the data set to describe")
    extensions.add_flag(parser)
    return parser


def describe(name: str) -> str:
    """What a data set is, its files and its keys; ``UserError`` for an unknown name."""
    data = DATASET_REGISTRY.get(name, "oodprompt datasets")
    parts = [inspect.cleandoc(data.__doc__ or "")]
    if tree := getattr(data, "tree", ""):
        parts.append("Files (ROOT is --root):\n" + textwrap.indent(textwrap.dedent(tree).strip("\n"), "  "))
    if address := getattr(data, "address", ""):
        parts.append(f"Where to get it: {address}")
    if inside := _keys(name):
        parts.append("Keys:\n" + "\n".join(inside))
    return "\n\n".join(parts)


def _keys(name: str) -> list[str]:
    """A paragraph for each key of the data set's own section."""
    section = section_of(name, sections_of("DATASET"))
    lines = {key: f"  {key} ({entry.default!r}): {entry.doc}" for key, entry in declared_keys().items()}
    own = [line for key, line in lines.items() if section and key.startswith(f"DATASET.{section}.")]
    return [textwrap.fill(line, 110, subsequent_indent="      ") for line in own]


def run(argv: Sequence[str] | None = None) -> None:
    """Print the list, or one data set."""
    args = build_parser().parse_args(argv)
    extensions.add(args.imports)
    extensions.register_all()
    if args.name:
        print(describe(args.name))
        return
    for name, data in DATASET_REGISTRY.items():
        print(f"{name:<18} {inspect.cleandoc(data.__doc__ or '').splitlines()[0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
