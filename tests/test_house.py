"""Rules of the house that no other tool holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.runs import REPOSITORY, load_script

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
    """What the file imports out of a test module or a conftest.py, whose fixtures come by their names."""
    return [
        name
        for name in imported(path, text)
        if name.startswith("tests.") and any(re.match("test_|conftest$", part) for part in name.split("."))
    ]


def test_no_test_module_imports_another() -> None:
    """A test that is moved or cut must not take others along: what tests share is in tests/helpers/ or a fixture."""
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
        ("from tests.conftest import data_root", ["tests.conftest.data_root"]),
        ("from .conftest import build", ["tests.data.conftest.build"]),
        ("from . import test_cli", ["tests.data.test_cli"]),
        ("from .test_cli import run", ["tests.data.test_cli.run"]),
        ("from ..engine.test_cli import run", ["tests.engine.test_cli.run"]),
        ("def f():\n    from tests.engine.test_cli import run", ["tests.engine.test_cli.run"]),
        ("from tests.helpers.runs import torchrun\nimport torch.testing", []),
    ],
)
def test_imports_of_every_form_are_seen(text: str, names: list[str]) -> None:
    assert imported_tests(Path("tests/data/test_loading.py"), text) == names


def test_no_class_file_or_function_is_over_its_limit() -> None:
    """A reader keeps a class of 300, a file of 500 and a function of 100 lines in mind, and not more."""
    house = load_script("scripts/maintain/house.py")
    found = [size for path, name in house.package_files(REPOSITORY) for size in house.sizes(path, name)]
    assert [size for size in found if size[1] > house.LIMITS[size[0]]] == []


def test_sizes_count_every_line_of_a_definition(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def f(self):\n        return 1\n\n\ndef g():\n    pass\n")
    sizes = list(load_script("scripts/maintain/house.py").sizes(tmp_path / "a.py", "a.py"))
    assert sizes == [("file", 7, "a.py"), ("class", 3, "a.py:A"), ("function", 2, "a.py:g"), ("function", 2, "a.py:f")]
