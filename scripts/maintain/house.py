"""The sizes of the package by room, and what is over the limits: ``python scripts/maintain/house.py``.

Exit status 1 where a class, a file or a function is over its limit. The import contracts are checked by
``scripts/maintain/structure.sh``.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tabulate import tabulate

REPOSITORY = Path(__file__).resolve().parents[2]
LIMITS = {"class": 300, "file": 500, "function": 100}  # lines
FREE = ("oodprompt/backbones/model.py",)  # one file on purpose: all towers side by side


def sizes(path: Path, name: str) -> Iterator[tuple[str, int, str]]:
    """(kind, lines, place) of a file and of every class and function in it."""
    text = path.read_text(encoding="utf-8")
    if name not in FREE:
        yield "file", text.count("\n"), name
    for node in ast.walk(ast.parse(text)):
        kind = "class" if isinstance(node, ast.ClassDef) else "function" if isinstance(node, ast.FunctionDef) else ""
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            yield kind, (node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.name}"


def package_files(root: Path) -> Iterator[tuple[Path, str]]:
    """The Python files of the package in the checkout ``root``, with their names in it."""
    for folder in ("oodprompt", "trainers", "datasets"):
        for path in sorted((root / folder).rglob("*.py")):
            yield path, path.relative_to(root).as_posix()


def main() -> int:
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else REPOSITORY
    found = [size for path, name in package_files(root) for size in sizes(path, name)]
    rooms: Counter[str] = Counter()
    for path, name in package_files(root):
        rooms["/".join(name.split("/")[:2]) if name.startswith("oodprompt/") else name.split("/")[0]] += len(
            path.read_text(encoding="utf-8").splitlines()
        )
    print(tabulate([*rooms.items(), ("all", rooms.total())], headers=("room", "lines"), tablefmt="github"))
    over = [size for size in found if size[1] > LIMITS[size[0]]]
    for kind, limit in LIMITS.items():
        lines, place = max((lines, place) for of, lines, place in found if of == kind)
        print(f"largest {kind}: {lines} lines of at most {limit} ({place})")
    for kind, lines, place in over:
        print(f"over the limit: {kind} {place}, {lines} lines", file=sys.stderr)
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
