"""Rules of the house that no other tool holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY

TESTS = sorted((REPOSITORY / "tests").rglob("*.py"))


def imported(path: Path, text: str) -> Iterator[str]:
    """Dotted names of all that the file at ``path`` (below the repository) imports, also inside functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parts) - node.level] if node.level else ()
            module = ".".join([*package, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_tests(path: Path, text: str) -> list[str]:
    """What the file imports out of a test module."""
    return [
        name
        for name in imported(path, text)
        if name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
    ]


def test_no_test_module_imports_another() -> None:
    """A test that is moved or cut must not take others along: what tests share is in tests/helpers/ or a conftest.py."""
    found = {}
    for file in TESTS:
        path = file.relative_to(REPOSITORY)
        names = imported_tests(path, file.read_text(encoding="utf-8"))
        if names:
            found[str(path)] = names
    assert found == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("from tests.engine.test_cli import run", ["tests.engine.test_cli.run"]),
        ("from tests.engine import test_cli", ["tests.engine.test_cli"]),
        ("import tests.engine.test_cli as cli", ["tests.engine.test_cli"]),
        ("from . import test_cli", ["tests.data.test_cli"]),
        ("from .test_cli import run", ["tests.data.test_cli.run"]),
        ("from ..engine.test_cli import run", ["tests.engine.test_cli.run"]),
        ("def f():\n    from tests.engine.test_cli import run", ["tests.engine.test_cli.run"]),
        ("from tests.helpers.runs import torchrun\nimport torch.testing", []),
    ],
)
def test_imports_of_every_form_are_seen(text: str, names: list[str]) -> None:
    assert imported_tests(Path("tests/data/test_loading.py"), text) == names
