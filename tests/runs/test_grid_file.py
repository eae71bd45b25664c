"""A grid by a file: what it trains, what is kept, its tables, a sweep and its page, and what makes no sense."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from oodprompt.errors import UserError
from oodprompt.runs.benchmark import main, read_arguments, read_runs
from oodprompt.runs.grid import TrainingRun, file_runs
from oodprompt.runs.grid_file import read_grid
from oodprompt.runs.grid_tables import page_text, results_of, tables_text, write_tables
from tests.helpers.runs import CONFIG, REPOSITORY, SMALL

GRID = {
    "config": CONFIG,
    "common": " ".join(map(str, SMALL)) + " OPTIM.MAX_EPOCH 1 TRAIN.VAL_FREQ 0",
    "settings": {"0.8": "DATASET.SHAPES.CORRELATION 0.8", "0.5": "DATASET.SHAPES.CORRELATION 0.5"},
    "methods": {"CoOp": "--trainer ZeroshotCLIP", "two": "--trainer DebiasedPT OPTIM.MAX_EPOCH 2"},
}
GRIDS = sorted((REPOSITORY / "scripts" / "grids").glob("*.yaml"))


def write_grid(path: Path, **entries: Any) -> Path:
    content = {**GRID, **entries}
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not ...}, sort_keys=False))
    return path


def pretend(run: TrainingRun, worst: float | None, accuracy: float = 0.5) -> None:
    """Results of a run that was not trained."""
    run.folder.mkdir(parents=True)
    gap = None if worst is None else accuracy - worst
    content = {"dataset": "S", "backbone": "tiny", "split": "test", "seed": run.seed, "accuracy": accuracy, "gap": gap}
    (run.folder / "results.json").write_text(json.dumps(content | {"worst_group_accuracy": worst}))


# --- training ----------------------------------------------------------------------------------------------------


def test_what_is_missing_is_trained_and_tabulated(
    data_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = write_grid(tmp_path / "grid.yaml"), tmp_path / "out"
    words = [str(file), "--seeds", "1", "2", "--root", str(data_root), "--out", str(out), "--jobs", "2"]
    assert main(words) == 0
    printed = capfd.readouterr().out
    runs = {path.parent.relative_to(out): json.loads(path.read_text()) for path in out.glob("*/*/*/results.json")}
    assert set(map(str, runs)) == {f"{s}/{m}/seed{k}" for s in ("0.8", "0.5") for m in ("CoOp", "two") for k in (1, 2)}
    worst = [100 * runs[Path(f"0.5/two/seed{k}")]["worst_group_accuracy"] for k in (1, 2)]
    table = (out / "table.md").read_text()
    assert f"{statistics.fmean(worst):.1f} ± {statistics.stdev(worst):.1f}" in table and table in printed
    assert "Training CoOp under 0.8, seed 1 (1 of 8)" in printed and printed.count("Finished ") == 8
    for folder, results in runs.items():
        keys = (out / folder / "config.yaml").read_text()
        assert f"CORRELATION: {folder.parts[0]}" in keys and results["seed"] == int(folder.name[-1])
        assert f"MAX_EPOCH: {2 if 'two' in folder.parts else 1}" in keys  # what a method says comes last
        assert results["split"] == "test" and "accuracy" in (out / folder / "train.log").read_text()
    assert (out / "table.png").stat().st_size > 5000 and list((out / "features").glob("*.npy"))
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/results.json")}
    broken = out / "0.5" / "CoOp" / "seed2" / "results.json"
    broken.write_text(broken.read_text()[:40])
    assert main(words) == 0
    again = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*/results.json")}
    assert [str(p.relative_to(out)) for p in again if again[p] != times[p]] == ["0.5/CoOp/seed2/results.json"]
    other = write_grid(
        tmp_path / "other.yaml", methods=GRID["methods"] | {"CoOp": "--trainer ZeroshotCLIP OPTIM.LR 0.7"}
    )
    assert main([str(other), *words[1:]]) == 2
    assert "run of another grid (OPTIM.LR was 0.002, is now 0.7)" in capfd.readouterr().err


def test_one_setting_without_a_name_needs_no_folder_and_is_compared(
    data_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    methods = {"second": "--trainer ZeroshotCLIP", "and first": "--trainer CoOp OPTIM.LR 1e38 OPTIM.MAX_EPOCH 6"}
    file = write_grid(tmp_path / "grid.yaml", settings=..., methods=methods, seeds=[3])
    out = tmp_path / "out"
    assert main([str(file), "--root", str(data_root), "--out", str(out), "--jobs", "1"]) == 1
    done = capfd.readouterr()
    assert sorted(str(p.parent.relative_to(out)) for p in out.rglob("config.yaml")) == [
        "and_first/seed3",
        "second/seed3",
    ]
    # The run that fails costs no other.
    assert "failed: " in done.err and "1 of 2 runs failed" in done.err and "the loss became nan" in done.err
    rows = (out / "comparison.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows] == [
        "method",
        rows[1].split("|")[1].strip(),
        "second",
        "and first",
    ]
    assert rows[0].split("|")[2].strip() == "accuracy, %" and [c.strip() for c in rows[3].split("|")[2:6]] == ["-"] * 4
    assert "ShapesOnScenes, tiny, test, 1 seed" in done.out and (out / "comparison.png").stat().st_size > 5000


def test_command_of_a_run(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, ("--seed", "1"))
    assert run.command[1:] == [str(REPOSITORY / "train.py"), "--seed", "1"]


# --- tables ------------------------------------------------------------------------------------------------------


def runs_of(file: Path, out: Path) -> list[TrainingRun]:
    return read_runs(read_arguments([str(file), "--out", str(out), "--seeds", "1", "2"]))[1]


def test_ranked_grid_reads_validation_data_and_puts_the_best_first(tmp_path: Path) -> None:
    methods = {
        "CoOp": {"args": "--trainer CoOp", "keys": {"OPTIM.LR": [0.002, 0.5], "TRAINER.COOP.N_CTX": [4]}},
        "alone": "--trainer ZeroshotCLIP",
    }
    file = write_grid(tmp_path / "sweep.yaml", methods=methods, rank=True)
    runs = runs_of(file, tmp_path / "out")
    assert len(runs) == 12 and all(list(run.arguments[-2:]) == ["TEST.SPLIT", "val"] for run in runs)
    for run in runs:
        better = "OPTIM.LR_0.5" in run.method
        pretend(run, 0.2 + 0.5 * better + (0.1 if run.setting == "0.8" else 0), 0.9)
    grid = read_grid(file)
    text = tables_text(grid, results_of(grid, runs))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == ["", "0.8: worst group", "0.8: average", "0.5: worst group", "0.5: average"]
    assert rows[1:3] == [
        ["OPTIM.LR 0.5, COOP.N_CTX 4", "80.0", "90.0", "70.0", "90.0"],
        ["OPTIM.LR 0.002, COOP.N_CTX 4", "30.0", "90.0", "20.0", "90.0"],
    ]
    assert text.startswith("## CoOp\n") and "\n## Others\n" in text
    for folder in tmp_path.glob("out/*/CoOp_OPTIM.LR_0.5*"):
        for results in folder.rglob("results.json"):
            results.unlink()
    rows = tables_text(grid, results_of(grid, runs)).splitlines()
    assert "OPTIM.LR 0.5" in rows[5] and rows[5].count(" - ") == 4, "what has no results comes last"


def test_page_of_a_sweep_is_written_when_all_of_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("oodprompt.runs.launch.changed_keys", lambda folder, arguments: [])
    page = tmp_path / "docs" / "page.md"
    texts = {"title": "A sweep", "about": "What it is.\n\n**Numbers.** In %.\n", "page": str(page), "seeds": [1, 2]}
    file = write_grid(tmp_path / "sweep.yaml", rank=True, settings=..., **texts)
    for run in runs_of(file, tmp_path / "out"):
        pretend(run, 0.2)
    words = [str(file), "--out", str(tmp_path / "out")]
    assert main([*words, "--seeds", "1"]) == 0 and not page.exists()
    assert f"{page} is left as it is" in capsys.readouterr().out
    assert main(words) == 0 and str(page) in capsys.readouterr().out
    head = f"# A sweep\n\nWhat it is.\n\n```bash\npython scripts/benchmark.py {file} --seeds 1 2\n```\n\n**Numbers.** In %.\n\n"
    assert page.read_text() == head + (tmp_path / "out" / "table.md").read_text()
    assert "| worst group   | average" in page.read_text()


def test_without_groups_tables_have_accuracy_alone(tmp_path: Path) -> None:
    for entries, name in (({}, "table"), ({"settings": ...}, "comparison"), ({"rank": True}, "table")):
        out = tmp_path / f"{name}{len(entries)}{'rank' in entries}"
        file = write_grid(tmp_path / "grid.yaml", **entries)
        runs, grid = runs_of(file, out), read_grid(file)
        for run in runs:
            pretend(run, None, 0.25)
        text, files = write_tables(grid, results_of(grid, runs), out)
        assert [f.name for f in files] == [f"{name}.md"] and "25.0" in text and "orst" not in text and "ap," not in text


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"settings": 3}, "settings must be a mapping"),
        ({"settings": {}}, "settings must be a mapping"),
        ({"method": {}}, "unknown entry 'method'.*did you mean 'methods'"),
        ({"methods": {}}, "needs the mapping methods"),
        ({"methods": {"CoOp": ["--trainer", "CoOp"]}}, r"methods\.CoOp must be a command line"),
        ({"config": None}, "config must name a config file"),
        ({"settings": {"a": 5}}, r"settings\.a must be a piece of a command line, not 5"),
        ({"methods": {"CoOp": "--trainer 'CoOp"}}, r"methods\.CoOp: No closing quotation"),
        ({"methods": {"CoOp": "--trainer CoOp --seed 3"}}, r"methods\.CoOp: --seed is set for each run"),
        ({"common": "OUTPUT_DIR x"}, "common: OUTPUT_DIR is set for each run"),
        ({"rank": True, "methods": {"a": {"args": "", "keys": {"OPTIM.LR": 0.1}}}}, r"methods\.a\.keys must be KEY:"),
        ({"rank": True, "methods": {"a": {"args": "", "keys": None}}}, r"methods\.a\.keys must be KEY:"),
        ({"methods": {"CoOp": {"args": "--trainer CoOp", "keys": {}}}}, r"methods\.CoOp must be a command line"),
        ({"seeds": 3}, "seeds must be a list of whole numbers"),
        ({"seeds": [-1]}, "seeds must be a list of whole numbers"),
        ({"seeds": [True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [1, 1]}, "one is given twice"),
        ({"title": 3}, "title must be a text, not 3"),
        ({"page": "x.md"}, "a page needs seeds"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, entries: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_grid(write_grid(tmp_path / "grid.yaml", **entries))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match="not valid yaml"):
        read_grid(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- a")
    with pytest.raises(UserError, match="needs the mapping methods"):
        read_grid(tmp_path / "list.yaml")
    with pytest.raises(UserError, match="no grid file"):
        read_grid(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("entries", "words", "message"),
    [
        ({"methods": {"bad": "--trainer CoOpp"}}, [], r"methods\.bad under settings\.0\.8: .*did you mean 'CoOp'"),
        ({"settings": {"a": "OPTIM.LRR 1"}}, [], r"methods\.CoOp under settings\.a: .*unknown config key 'OPTIM.LRR'"),
        ({"methods": {"A B": "--trainer CoOp", "A_B": "--trainer CoOp"}}, [], "two methods go to the folder .*A_B"),
        ({}, ["--trainers", "CoOp"], "--trainers: .*grid.yaml says what is trained"),
        ({}, ["--bases", "CoOp"], "--bases: .*grid.yaml says what is trained"),
        ({}, ["--baseline", "CoOp"], "scripts/collect.py OUT --baseline METHOD"),
        ({}, ["--opts", "TRAINER.NAME", "CoOp"], "--opts TRAINER.NAME: .*grid.yaml says it"),
        ({}, ["--seeds", "-1"], "--seeds: give 0 or more"),
    ],
)
def test_grids_that_make_no_sense_train_nothing(
    tmp_path: Path, entries: dict[str, Any], words: list[str], message: str
) -> None:
    file = write_grid(tmp_path / "grid.yaml", **entries)
    with pytest.raises(UserError, match=message):
        read_runs(read_arguments([str(file), "--out", str(tmp_path / "out"), *words]))
    assert not (tmp_path / "out").exists()


def test_a_grid_is_needed() -> None:
    with pytest.raises(UserError, match="give GRID.yaml, or --trainers"):
        read_arguments([])
    with pytest.raises(UserError, match="give GRID.yaml, or --config-file"):
        read_arguments(["--trainers", "CoOp"])


def test_first_runs_of_each_setting_come_first_and_opts_last(tmp_path: Path) -> None:
    grid = read_grid(write_grid(tmp_path / "grid.yaml"))
    runs = file_runs(grid, [1, 2], ["--root", "mine"], ["OPTIM.LR", "0.5"], tmp_path)
    assert [(run.setting, run.method, run.seed) for run in runs[:2]] == [("0.8", "CoOp", 1), ("0.5", "CoOp", 1)]
    assert len(runs) == 8 and all(run.arguments[-2:] == ("OPTIM.LR", "0.5") for run in runs)
    assert all("mine" in run.arguments for run in runs)


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_grids_of_the_repository(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    grid = read_grid(file.relative_to(REPOSITORY))
    seeds = grid.seeds
    runs = file_runs(grid, seeds, [], [], Path("out"))
    assert seeds and len(runs) == len(grid.methods) * len(grid.settings) * len(seeds)
    if grid.page:
        head = page_text(grid, "").strip()
        assert grid.rank and Path(grid.page).read_text().startswith(f"{head}\n\n## ")


def test_the_grids_of_the_repository_are_known() -> None:
    assert len(GRIDS) == 17 and "quickstart" in {file.stem for file in GRIDS}
