"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import re

from tests.conftest import REPOSITORY


def test_config_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("config_reference", REPOSITORY / "scripts" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.reference(), "run python scripts/config_reference.py"


def test_files_named_in_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    named = set(
        re.findall(r"(?:scripts|configs|docs|datasets|trainers|oodprompt|tests|benchmarks)/[\w./-]+\.\w+", text)
    )
    assert named and [name for name in named if not (REPOSITORY / name).exists()] == []
