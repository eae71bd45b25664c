"""A grid by flags: which runs it is of, their command lines, and what makes no sense."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from oodprompt.config import extensions
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.runs.benchmark import main, read_arguments, read_runs, run
from tests.helpers.jobs import Line
from tests.helpers.runs import CONFIG, REPOSITORY


def test_dry_run_prints_every_run_of_the_grid(
    line: Line,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mine.py").write_text("")
    monkeypatch.setenv(extensions.ENVIRONMENT, "")
    more = ["--bases", "CoOp", "MaPLe", "--datasets", "waterbirds", "shapes_on_scenes", "--dry-run"]
    more += ["--import", tmp_path / "mine.py"]
    assert main(line("CoOp", "CoOpOOD", "CoOpOOD+DebiasedPT", more=more, opts=["OPTIM.LR", "0.5"])) == 0
    commands = [shlex.split(text) for text in capsys.readouterr().out.splitlines()]
    assert all(words[:2] == ["python", "train.py"] for words in commands)
    assert all(words[words.index("--import") + 1] == str(tmp_path / "mine.py") for words in commands)
    configs = [setup_cfg(build_parser().parse_intermixed_args(words[2:])) for words in commands]
    found = {
        str(Path(c.OUTPUT_DIR).relative_to(tmp_path / "out")): (c.TRAINER.NAME, c.TRAINER.BASE, c.TRAINER.STACK)
        for c in configs
    }
    methods = {
        "CoOp": ("CoOp", "", ()),
        "CoOpOOD-CoOp": ("CoOpOOD", "CoOp", ()),
        "CoOpOOD-MaPLe": ("CoOpOOD", "MaPLe", ()),
        "CoOpOOD+DebiasedPT-CoOp": ("CoOpOOD", "CoOp", ("DebiasedPT",)),
        "CoOpOOD+DebiasedPT-MaPLe": ("CoOpOOD", "MaPLe", ("DebiasedPT",)),
    }
    folders = ("waterbirds", "shapes_on_scenes")
    assert found == {f"{d}/{m}/seed{s}": keys for d in folders for m, keys in methods.items() for s in (1, 2)}
    assert len(commands) == len(found) == 20
    for cfg in configs:
        place = Path(cfg.OUTPUT_DIR)
        # The data set that is asked for wins over the one that the method's file names.
        assert {"waterbirds": "Waterbirds", "shapes_on_scenes": "ShapesOnScenes"}[place.parts[-3]] == cfg.DATASET.NAME
        assert int(place.name[4:]) == cfg.SEED and cfg.OPTIM.LR == 0.5 and cfg.OPTIM.MAX_EPOCH == 2
    assert not (tmp_path / "out").exists()


def test_each_trainer_has_its_own_file(line: Line) -> None:
    file = str(REPOSITORY / "configs/trainers/DebiasedPT/tiny_shapes.yaml")
    args = line("CoOp", "CoOpOOD", "CoOpOOD+GroupDRO", seeds=[1])
    place = args.index("--config-file") + 2
    args[place:place] = [f"CoOpOOD={file}"]
    _, jobs, _ = read_runs(read_arguments(args))
    files = [job.arguments[job.arguments.index("--config-file") + 1] for job in jobs]
    assert files == [CONFIG, file, file]
    assert [job.folder.parts[-3:-1] for job in jobs][0] == ("ShapesOnScenes", "CoOp")
    del args[place - 1]
    with pytest.raises(UserError, match="--config-file: none for CoOp; give FILE for all trainers or CoOp=FILE"):
        read_runs(read_arguments(args))


@pytest.mark.parametrize(
    ("trainers", "more", "opts", "message"),
    [
        (["CoOpp"], [], [], "--trainers: .*CoOpp.*did you mean 'CoOp'"),
        (["CoOpOOD"], ["--bases", "MaPL"], [], "unknown prompt learner 'MaPL'"),
        (["CoOp"], ["--datasets", "waterbird"], [], "no config file at .*waterbird.yaml"),
        (["CoOp"], [], ["OPTIM.LRR", "1"], "unknown config key 'OPTIM.LRR'"),
        (["CoOp"], ["--jobs", "0"], [], "--jobs: give 1 or more"),
        (["CoOp", "CoOp"], [], [], "--trainers: CoOp is given twice"),
        (["CoOp"], ["--slurm", "gpu", "--gpus", "0"], [], "leave it out with --slurm"),
        (["CoOp"], ["--slurm", "gpu", "--slurm-opts", "x"], [], "KEY=VALUE expected, not 'x'"),
        (["CoOp"], ["--datasets", "csv", "/else/csv.yaml"], [], "no config file at /else/csv.yaml|two files"),
        (["CoOp"], ["--config-file", CONFIG, CONFIG], [], "one file for all trainers"),
        (["CoOp"], [], ["SEED", "7"], "--opts SEED: give --seeds"),
        (["CoOp"], [], ["TRAINER.STACK", "('DFR',)"], r"--opts TRAINER.STACK: give --trainers A\+B"),
        (["CoOp"], ["--seeds", "-1", "1"], [], "--seeds: give 0 or more"),
        (["CoOp"], ["--baseline", "Coop"], [], "--baseline: no row is of 'Coop': did you mean 'CoOp'"),
        (["CoOp"], ["--out", "/proc/nowhere"], [], "--out: cannot write /proc/nowhere/.*choose another folder"),
        (["CoOp"], ["--job", "x"], [], "--jobs: invalid int value"),
    ],
)
def test_grids_that_make_no_sense(
    line: Line,
    tmp_path: Path,
    trainers: list[str],
    more: list[str],
    opts: list[str],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        run(line(*trainers, more=more, opts=opts))
    assert not (tmp_path / "out").exists(), "nothing is trained first"


def test_two_data_sets_of_one_folder(line: Line, tmp_path: Path) -> None:
    (tmp_path / "csv.yaml").write_text("DATASET:\n  NAME: CSV\n")
    with pytest.raises(UserError, match="two files are named csv"):
        run(line("CoOp", more=["--datasets", "csv", tmp_path / "csv.yaml"]))
