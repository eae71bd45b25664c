"""``oodprompt doctor``, ``oodprompt train ...`` and ``oodprompt cache``: the commands of an installed package, also as ``python -m oodprompt``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: oodprompt COMMAND ...
  doctor [--root DIR]   what is installed and found, what is wrong and what to do
  train ...             what train.py does, with its flags
  export ...            a trained run as one file (safetensors, ONNX)
  compare RUN RUN ...   several runs on one page
  backbones [NAME]      CLIPs that can be named, and what each takes
  cache [prune ...]     image features that are kept on disk; which to remove
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status, 2 for an unknown one."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    if command == "doctor":
        from oodprompt.doctor import main as doctor

        return doctor(words[1:])
    if command == "train":
        from oodprompt.cli import main as train

        return train(words[1:])
    if command == "cache":
        from oodprompt.cache import main as cache

        return cache(words[1:])
    if command == "export":
        from oodprompt.serving.command import main as export

        return export(words[1:])
    if command == "compare":
        from oodprompt.comparing import main as compare

        return compare(words[1:])
    if command == "backbones":
        from oodprompt.list_backbones import main as backbones

        return backbones(words[1:])
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    print(f"error: unknown command {command!r}\n{USAGE}" if command else USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
