"""The wheel, made from the source archive, works in an environment that has nothing else of this checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import oodprompt
from tests.helpers.runs import REPOSITORY, SMALL

SOURCES = ("oodprompt", "trainers", "datasets", "configs", "docs")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def _build(kind: str, source: Path, output: Path) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(output)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return output / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the source archive of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "images"))
    for file in REPOSITORY.iterdir():
        if file.is_file():
            shutil.copy(file, source)
    archive = _build("sdist", source, folder)
    shutil.unpack_archive(archive, folder / "unpacked")
    return _build("wheel", next((folder / "unpacked").iterdir()), folder)


def test_the_wheel_holds_all_that_the_package_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    for folder, place in (("oodprompt", "oodprompt"), *((name, f"oodprompt/{name}") for name in SOURCES[1:4])):
        for path in (REPOSITORY / folder).rglob("*"):
            inside = f"{place}/{path.relative_to(REPOSITORY / folder).as_posix()}"
            if path.is_file() and path.suffix not in (".pyc", ".md"):
                assert inside in names, f"{inside} is missing; see package_data in setup.py"
    assert f"oodprompt-{oodprompt.__version__}.dist-info/METADATA" in names


def test_a_run_outside_the_checkout(wheel: Path, tmp_path: Path, data_root: Path) -> None:
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=60)
    libraries = next(venv.glob("lib/python*/site-packages"))
    (libraries / "others.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files do not count: no checkout
    install = [
        "--python",
        str(venv / "bin" / "python"),
        "install",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--quiet",
    ]
    subprocess.run([sys.executable, "-m", "pip", *install, str(wheel)], check=True, timeout=100)
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    command = [
        "train",
        "--trainer",
        "CoOpOOD",
        "--config-file",
        "trainers/CoOpOOD/tiny_shapes.yaml",
        "--output-dir",
        "out",
    ]
    done = subprocess.run(
        [str(venv / "bin" / "oodprompt"), *command, "--root", str(data_root), *SMALL, "OPTIM.MAX_EPOCH", "1"],
        cwd=tmp_path,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["trainer"] == "CoOpOOD"
    where = [str(venv / "bin" / "python"), "-c", "import oodprompt.trainers as t; print(t.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100).stdout
    assert found.strip() == str(libraries / "oodprompt" / "trainers" / "__init__.py")


def test_the_changelog_knows_the_version() -> None:
    assert f"\n## {oodprompt.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
