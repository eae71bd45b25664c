"""The shell scripts: arguments of theirs do not reach the installer, a current environment is used as it is."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from oodprompt.errors import UserError
from tests.helpers.runs import CONFIG, REPOSITORY, SMALL, load_script

GRID = {
    "config": CONFIG,
    "common": " ".join(map(str, SMALL)) + " OPTIM.MAX_EPOCH 1 TRAIN.VAL_FREQ 0",
    "settings": {"0.8": "DATASET.SHAPES.CORRELATION 0.8", "0.5": "DATASET.SHAPES.CORRELATION 0.5"},
    "methods": {"CoOp": "--trainer CoOp", "two": "--trainer DebiasedPT OPTIM.MAX_EPOCH 2"},
}


@pytest.fixture(scope="module")
def grid() -> ModuleType:
    return load_script("scripts/grid.py")


def write_grid(path: Path, **entries: Any) -> Path:
    path.write_text(yaml.safe_dump({**GRID, **entries}))
    return path


def run_grid(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "scripts" / "grid.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_grid_trains_what_is_missing_and_tabulates(data_root: Path, tmp_path: Path) -> None:
    file, out = write_grid(tmp_path / "grid.yaml"), tmp_path / "out"
    where = ["--seeds", 1, 2, "--root", data_root, "--out", out, "--jobs", 2]
    done = run_grid(file, *where)
    assert done.returncode == 0, done.stderr
    runs = {path.parent.relative_to(out): json.loads(path.read_text()) for path in out.glob("*/*/*/results.json")}
    assert set(map(str, runs)) == {f"{s}/{m}/seed{k}" for s in ("0.8", "0.5") for m in ("CoOp", "two") for k in (1, 2)}
    worst = [100 * runs[Path(f"0.5/two/seed{k}")]["worst_group_accuracy"] for k in (1, 2)]
    table = (out / "table.md").read_text()
    assert f"{statistics.fmean(worst):.1f} ± {statistics.stdev(worst):.1f}" in table and "Worst-group" in done.stdout
    for folder, results in runs.items():
        keys = (out / folder / "config.yaml").read_text()
        assert f"CORRELATION: {folder.parts[0]}" in keys and results["seed"] == int(folder.name[-1])
        assert f"MAX_EPOCH: {2 if 'two' in folder.parts else 1}" in keys  # what a method says comes last
        assert results["split"] == "test"
    assert (out / "table.png").stat().st_size > 5000
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/results.json")}
    (out / "0.5" / "CoOp" / "seed2" / "results.json").unlink()
    assert run_grid(file, *where).returncode == 0
    again = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/results.json")}
    assert [str(p.relative_to(out)) for p in again if again[p] != times[p]] == ["0.5/CoOp/seed2/results.json"]


def test_runs_of_another_grid_are_not_taken_for_this_one(data_root: Path, tmp_path: Path) -> None:
    where = ["--seeds", 1, "--root", data_root, "--out", tmp_path / "out"]
    one = {"settings": {"0.8": "DATASET.SHAPES.CORRELATION 0.8"}, "methods": {"M": "--trainer ZeroshotCLIP"}}
    assert run_grid(write_grid(tmp_path / "a.yaml", **one), *where).returncode == 0
    assert run_grid(tmp_path / "a.yaml", *where).returncode == 0
    done = run_grid(write_grid(tmp_path / "b.yaml", **one | {"methods": {"M": "--trainer OrthCal"}}), *where)
    assert done.returncode == 2 and "TRAINER.NAME was 'ZeroshotCLIP', is now 'OrthCal'" in done.stderr
    methods = {"A B": "--trainer ZeroshotCLIP", "A_B": "--trainer OrthCal"}
    done = run_grid(write_grid(tmp_path / "c.yaml", **one | {"methods": methods}), *where)
    assert done.returncode == 2 and "two methods of the grid go to the folder" in done.stderr


def test_ranked_grid_reads_validation_data_and_puts_the_best_first(data_root: Path, tmp_path: Path) -> None:
    methods = {"CoOp": {"args": "--trainer CoOp", "keys": {"OPTIM.LR": [0.002, 0.5], "OPTIM.WARMUP_EPOCH": [-1]}}}
    file, out = write_grid(tmp_path / "sweep.yaml", methods=methods, rank=True), tmp_path / "out"
    done = run_grid(file, "--seeds", 3, "--root", data_root, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(path.read_text()) for path in out.glob("*/*/*/results.json")]
    assert len(rows) == 4 and {row["split"] for row in rows} == {"val"}
    lines = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("| OPTIM.LR")]
    values = [[float(cell) for cell in line.split("|")[2:-1]] for line in lines]
    assert len(values) == 2 and values[0][0] + values[0][2] >= values[1][0] + values[1][2]


def test_failing_runs_are_named_and_the_others_kept(data_root: Path, tmp_path: Path) -> None:
    file = write_grid(tmp_path / "grid.yaml", methods={"good": "--trainer CoOp", "bad": "--trainer CoOpp"})
    done = run_grid(file, "--seeds", 1, "--root", data_root, "--out", tmp_path / "out")
    assert done.returncode == 2 and "2 of 4 runs failed" in done.stderr and "CoOpp" in done.stderr
    assert len(list(tmp_path.glob("out/*/good/seed1/results.json"))) == 2


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"settings": 3}, "mappings settings and methods"),
        ({"method": {}}, "unknown entry 'method'.*did you mean 'methods'"),
        ({"methods": {"CoOp": ["--trainer", "CoOp"]}}, r"methods\.CoOp must be a command line"),
        ({"settings": {}}, "mappings settings and methods"),
        ({"config": None}, "config must name a config file"),
        ({"settings": {"a": 5}}, r"settings\.a must be a piece of a command line, not 5"),
        ({"methods": {"CoOp": "--trainer 'CoOp"}}, r"methods\.CoOp: No closing quotation"),
        ({"rank": True, "methods": {"a": {"args": "", "keys": {"OPTIM.LR": 0.1}}}}, r"methods\.a\.keys must be KEY:"),
        ({"rank": True, "methods": {"a": {"args": "", "keys": None}}}, r"methods\.a\.keys must be KEY:"),
        ({"methods": {"CoOp": {"args": "--trainer CoOp", "keys": {}}}}, r"methods\.CoOp must be a command line"),
    ],
)
def test_grids_that_make_no_sense(grid: ModuleType, tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        grid.read_grid(write_grid(tmp_path / "grid.yaml", **entries))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid yaml"):
        grid.read_grid(tmp_path / "broken.yaml")
    with pytest.raises(UserError, match="no grid file"):
        grid.read_grid(tmp_path / "missing.yaml")


@pytest.mark.parametrize("name", ["sweep", "table", "noise"])
def test_grids_of_the_repository_are_read(grid: ModuleType, name: str) -> None:
    content = grid.read_grid(REPOSITORY / "scripts" / "debiasers" / f"{name}.yaml")
    folders = [m.folder for m in content["methods"]]
    assert len(set(folders)) == len(folders) > 5 and (REPOSITORY / content["config"]).is_file()


def environment(venv: Path, stamp: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Source environment.sh with a stand-in for the environment's Python that tells when pip is called."""
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text('#!/bin/sh\necho "called: $*"\n')
    python.chmod(0o755)
    (venv / ".oodprompt").write_text(stamp)
    script = 'set -euo pipefail; . scripts/environment.sh; echo "PY=$PY"'
    variables = {"PATH": "/usr/bin:/bin", "OODPROMPT_VENV": str(venv), "PYTHON": sys.executable}
    command = ["bash", "-c", script, "script", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60)


def key() -> str:
    digest = hashlib.sha256((REPOSITORY / "setup.py").read_bytes()).hexdigest()
    return f"{sys.version_info.major} {sys.version_info.minor} {digest}"


def test_current_environment_is_reused_whatever_the_arguments(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"{key()}\n{REPOSITORY}\n[test]\n", "1 2 3", "output/x")
    assert (done.returncode, done.stdout) == (0, f"PY={tmp_path}/venv/bin/python\n"), done.stderr


def test_environment_of_another_checkout_is_pointed_here(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"{key()}\n/elsewhere\n[test]\n")
    assert "--no-deps -e ." in done.stdout
    assert (tmp_path / "venv" / ".oodprompt").read_text() == f"{key()}\n{REPOSITORY}\n[test]\n"


def test_changed_requirements_are_installed(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"old\n{REPOSITORY}\n\n", "1 2 3")
    assert done.stdout.count("called: -m pip install") == 1 and "-e .\n" in done.stdout
