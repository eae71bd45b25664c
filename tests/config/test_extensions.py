"""Files and packages of others that bring methods, data sets and keys."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from oodprompt import __main__ as commands
from oodprompt import cli
from oodprompt.config import extensions, keys
from oodprompt.config.extensions import register_all
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.errors import UserError
from tests.helpers.forks import Forks

FILE = """
from helper_of_mine import NAME
from oodprompt.engine import TRAINER_REGISTRY
from oodprompt.engine.config import declare
from oodprompt.trainers.coop import CoOp

declare("TRAINER.MINE", {"SIZE": (3, "A size.")})
TRAINER_REGISTRY.register(type(NAME, (CoOp,), {"__doc__": "Of my own."}))
"""


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    register_all()
    monkeypatch.setattr(TRAINER_REGISTRY, "_objects", dict(TRAINER_REGISTRY._objects))
    monkeypatch.setattr(keys, "_KEYS", dict(keys._KEYS))
    monkeypatch.setattr(extensions, "_done", set(extensions._done))
    monkeypatch.setenv(extensions.ENVIRONMENT, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "helper_of_mine"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "helper_of_mine.py").write_text('NAME = "Mine"')
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def test_a_file_registers_its_method_and_keys_once(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(mine.parent)
    line = ["--import", "mine.py", "--trainer", "Mine", "--output-dir", "out", "TRAINER.MINE.SIZE", "5"]
    cfg = cli.setup_cfg(cli.build_parser().parse_intermixed_args(line))
    assert cfg.TRAINER.MINE.SIZE == 5 and "Mine" in TRAINER_REGISTRY.registered_names()
    extensions.add([str(mine)])
    extensions.load()  # a second time would be refused: the name is taken
    cli.run(["--import", str(mine), "--list"])
    assert "Of my own." in capsys.readouterr().out


def test_processes_started_from_here_know_it(mine: Path, monkeypatch: pytest.MonkeyPatch, forks: Forks) -> None:
    monkeypatch.chdir(mine.parent)
    extensions.add(["mine.py"])
    shown = forks.run(["train.py", "--list"], environment=os.environ)
    assert "Of my own." in shown.stdout, shown.stderr


def test_what_cannot_be_imported_says_why(mine: Path) -> None:
    def problem(*names: str) -> str:
        with pytest.raises(UserError) as error:
            extensions.add(names)
            extensions.load()
        return str(error.value)

    assert problem(str(mine.with_name("nothing.py"))) == f"--import: there is no file {mine.with_name('nothing.py')}"
    extensions.os.environ[extensions.ENVIRONMENT] = ""
    assert "there is no module no_such_module; a file ends in .py" in problem("no_such_module")
    extensions.os.environ[extensions.ENVIRONMENT] = ""
    mine.with_name("helper_of_mine.py").write_text('NAME = "CoOp"')
    assert "'CoOp' is already registered" in problem(str(mine)) and "another name" in problem(str(mine))
    assert "mine" not in sys.modules
    extensions.os.environ[extensions.ENVIRONMENT] = ""
    (mine.parent / "bare").mkdir()
    sys.path.append(str(mine.parent))
    for name, words in {
        "./mine": "give a file that ends in .py, or the name of a module",
        "bare": "a folder without __init__.py",
        "co:lon.py": "a path with ':' in it cannot be given",
    }.items():
        assert words in problem(name)
        extensions.os.environ[extensions.ENVIRONMENT] = ""
    for code, words in {
        "x = (": "mine.py: line 1: '(' was never closed",
        "import not_there_at_all": "it needs not_there_at_all, which is not installed",
        "import sys; sys.exit(0)": "it ends the program when it is imported",
    }.items():
        mine.write_text(code)
        assert words in problem(str(mine))


def test_the_same_file_by_two_names_is_imported_once(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mine.parent)
    monkeypatch.setenv(extensions.ENVIRONMENT, "mine.py")
    (mine.parent / "sub").mkdir()
    extensions.add(["sub/../mine.py", str(mine)])
    extensions.load()
    assert TRAINER_REGISTRY.get("Mine").__name__ == "Mine"


def test_a_file_that_was_edited_needs_a_new_program(mine: Path) -> None:
    extensions.add([str(mine)])
    extensions.load()
    mine.write_text(f"{FILE}# edited")
    with pytest.raises(
        UserError, match="^--import .*mine.py: the file was edited after it was imported.*; restart the"
    ):
        extensions.add([str(mine)])
    extensions.load()  # a run that has begun goes on
    mine.write_text(FILE)
    extensions.add([str(mine)])


def test_modules_and_the_path_of_others_are_left_alone(mine: Path) -> None:
    mine.rename(mine.parent / "json.py")
    (mine.parent / "random.py").write_text("1 / 0")
    extensions.add([str(mine.parent / "json.py")])
    extensions.load()
    import json
    import random

    assert json.dumps([1]) == "[1]" and random.random() < 1 and sys.path[-1] == str(mine.parent)
    assert "Mine" in TRAINER_REGISTRY.registered_names()


def test_an_error_in_the_file_is_shown_as_it_is(mine: Path) -> None:
    mine.write_text("1 / 0")
    extensions.add([str(mine)])
    with pytest.raises(ZeroDivisionError):
        extensions.load()
    with pytest.raises(ZeroDivisionError):  # and again, not taken for imported
        extensions.load()


def test_an_installed_package_is_imported(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        TRAINER_REGISTRY.register(type("Packaged", (), {}))  # a second time this would raise

    def fail() -> None:
        raise ImportError("no such thing")

    points = [
        SimpleNamespace(name="good", value="a.b", load=load),
        SimpleNamespace(name="bad", value="c.d", load=fail),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points if group == "oodprompt" else [])
    monkeypatch.syspath_prepend(str(mine.parent))  # other places: what is installed is read anew
    with pytest.warns(UserWarning, match=r"bad = c\.d failed: ImportError"):
        extensions.load()
    assert "Packaged" in TRAINER_REGISTRY.registered_names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extensions.load()  # neither again


def test_a_package_that_is_installed_meanwhile_is_imported(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    extensions.load()
    (site / "late.py").write_text("import sys\nsys.late = True\n")
    (site / "late-1.dist-info").mkdir()
    (site / "late-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1\n")
    (site / "late-1.dist-info" / "entry_points.txt").write_text("[oodprompt]\nlate = late\n")
    os.utime(site, (1, 1))
    monkeypatch.setattr(sys, "late", False, raising=False)
    extensions.load()
    assert sys.late


def test_commands_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["train", "--list"]) == 0
    assert "CoOpOOD" in capsys.readouterr().out
    assert commands.main(["--help"]) == 0 and "check the installation" in capsys.readouterr().out
    assert commands.main(["docter"]) == 2 and "unknown verb 'docter': did you mean 'doctor'?" in capsys.readouterr().err
    assert commands.main([]) == 2


def test_the_list_has_the_own_words_of_a_class(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class without words shows none, and not those of the class that it is derived from."""
    register_all()
    coop = TRAINER_REGISTRY.get("CoOp")
    monkeypatch.setattr(TRAINER_REGISTRY, "_objects", dict(TRAINER_REGISTRY._objects))
    TRAINER_REGISTRY.register(type("Silent", (coop,), {}))
    cli.print_list()
    lines = {words[0]: " ".join(words[1:]) for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    assert lines["Silent"] == "" and lines["CoOp"].startswith("Context optimisation")
