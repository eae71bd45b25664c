"""``python train.py`` as users and scripts meet it: exit status, one clear line on stderr, the output folder.

Every command line has a process of its own, whose exit status and streams are what the tests see.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import yaml

from oodprompt.config.keys import get_cfg_default, leaves, merge_file
from tests.helpers.forks import Done, Forks
from tests.helpers.runs import REPOSITORY

# A data set that train.py --list knows in the processes of this file alone.
_BIRDS = """
from oodprompt.datasets.metadata import read_metadata
from oodprompt.engine import DATASET_REGISTRY, DatasetBase

@DATASET_REGISTRY.register()
class ListedBirds(DatasetBase):
    "A data set with a file list."
    def __init__(self, cfg):
        folder = self.root(cfg) / "birds"
        super().__init__(cfg, *read_metadata(folder / "metadata.csv", folder, ("landbird", "waterbird")))
"""

_TINY = {
    "INPUT.SIZE": "(48, 48)",
    "INPUT.TRANSFORMS": "normalize",
    "DATALOADER.NUM_WORKERS": "0",
    "DATALOADER.TRAIN_X.BATCH_SIZE": "8",
    "DATASET.SHAPES.NUM_TRAIN": "24",
    "DATASET.SHAPES.NUM_VAL": "8",
    "DATASET.SHAPES.NUM_TEST": "8",
}


def _commands(folder: Path) -> dict[str, list[str]]:
    """Command lines by name; ``folder`` is theirs to use."""
    (folder / "in_the_way").write_text("")
    (folder / "no_birds").mkdir()
    (folder / "typo.yaml").write_text("OPTIM:\n  LRR: 0.1\n")
    (folder / "broken.yaml").write_text("OPTIM: [\n")

    def run(
        trainer: str = "CoOp", dataset: str = "ShapesOnScenes", backbone: str = "tiny", out: str = "o"
    ) -> list[str]:
        names = ["--trainer", trainer, "--backbone", backbone, "--root", str(folder / "data")]
        return [*names, "--output-dir", str(folder / out), *chain(*_TINY.items()), "DATASET.NAME", dataset]

    train = [*run(out="run"), "--seed", "0", "OPTIM.MAX_EPOCH", "2", "OPTIM.NAME", "sgd", "TRAIN.VAL_FREQ", "1"]
    train += ["TEST.COMPUTE_CMAT", "True"]
    return {
        "list": ["--list"],
        "trainer": run(trainer="CoOpODD"),
        "no_trainer": ["--output-dir", str(folder / "o")],
        "dataset": run(dataset="ShapeOnScene"),
        "no_dataset": run(dataset=""),
        "backbone": run(backbone="tinny"),
        "base": [*run(trainer="CoOpOOD"), "--base", "CoOpOOD"],
        "key": [*run(), "OPTIM.LRR", "0.1"],
        "key_in_file": [*run(), "--config-file", str(folder / "typo.yaml")],
        "value": [*run(), "OPTIM.LR", "fast"],
        "odd": [*run(), "OPTIM.LR"],
        "flag": [*run(), "--trianer", "CoOp"],
        "flag_value": [*run(), "--seed", "one"],
        "config_file": [*run(), "--config-file", str(folder / "typ.yaml")],
        "broken_file": [*run(), "--config-file", str(folder / "broken.yaml")],
        "output": run(out="in_the_way"),
        "output_below": run(out="in_the_way/o"),
        "no_root": [*run(dataset="ListedBirds"), "--root", ""],
        "root": [*run(dataset="ListedBirds"), "--root", str(folder / "gone")],
        "file_list": [*run(dataset="ListedBirds"), "--root", str(folder / "no_birds")],
        "model_dir": [*run(), "--eval-only", "--model-dir", str(folder / "gone")],
        "train": train,
        "eval": [*run(out="eval"), "--eval-only", "--model-dir", str(folder / "run"), "--seed", "0"],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def ran(folder: Path, forks: Forks) -> dict[str, Done]:
    """The result of every command line, by name."""
    return {
        name: forks.wait(forks.start(["train.py", *words], first=_BIRDS))[0]
        for name, words in _commands(folder).items()
    }


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "trainer": "--trainer: unknown trainer 'CoOpODD': did you mean 'CoOpOOD'?",
        "no_trainer": "--trainer: no trainer is named: .*CoOp, CoOpOOD",
        "dataset": "DATASET.NAME: unknown data set 'ShapeOnScene': did you mean 'ShapesOnScenes'?",
        "no_dataset": "DATASET.NAME: no data set is named",
        "backbone": "MODEL.BACKBONE.NAME: unknown backbone 'tinny': did you mean 'tiny'?",
        "base": "TRAINER.BASE: CoOpOOD is a debiaser.*CoOp",
        "key": "command line: unknown config key 'OPTIM.LRR': did you mean 'OPTIM.LR'?",
        "key_in_file": "typo.yaml: unknown config key 'OPTIM.LRR': did you mean 'OPTIM.LR'?",
        "value": "command line: OPTIM.LR takes a value of type float .*not 'fast'",
        "odd": "'OPTIM.LR' stands alone",
        "flag": "--trianer CoOp: did you mean '--trainer'?",
        "flag_value": "--seed: invalid int value: 'one'; see train.py --help",
        "config_file": "no config file at .*typ.yaml; that folder has: .*typo.yaml",
        "broken_file": "broken.yaml is not valid yaml: .*line 2",
        "output": "cannot write .*in_the_way.*choose another --output-dir",
        "output_below": "cannot write .*in_the_way.*choose another --output-dir",
        "no_root": "ListedBirds needs the folder of the data sets: give --root DIR",
        "root": "--root: there is no folder .*gone",
        "file_list": "no file list at .*no_birds/birds/metadata.csv; expected a csv with the columns .*img_filename",
        "model_dir": "--model-dir: there is no folder .*gone",
    }.items(),
)
def test_users_errors_are_one_line(ran: dict[str, Done], name: str, words: str) -> None:
    result = ran[name]
    assert result.returncode == 2, result.stderr
    assert re.fullmatch(r"error: .+\n", result.stderr), result.stderr
    assert re.search(words.replace("?", r"\?"), result.stderr), result.stderr
    assert "Traceback" not in result.stdout + result.stderr


def test_list_names_everything(ran: dict[str, Done]) -> None:
    result = ran["list"]
    assert (result.returncode, result.stderr) == (0, "")
    lines = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.startswith("  ")}
    assert {"CoOp", "CoOpOOD", "ZeroshotCLIP", "ShapesOnScenes", "tiny", "ViT-B/16"} <= lines.keys()
    assert all(lines.values()), "every name has its line of description"


def test_output_folder_of_a_run(ran: dict[str, Done], folder: Path) -> None:
    result, out = ran["train"], folder / "run"
    assert result.returncode == 0, result.stderr
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    files = {file for file in files if not file.startswith("tensorboard/events.out.tfevents")}
    assert files == {
        "log.txt",
        "config.yaml",
        "results.json",
        "results.md",
        "groups.png",
        "training.png",
        "cmat.pt",
        "prompt_learner/checkpoint",
        "prompt_learner/model.pth.tar-2",
    }
    log = (out / "log.txt").read_text()
    assert log == result.stdout
    accuracy = json.loads((out / "results.json").read_text())["accuracy"]
    after = log.split("Finish training\n")[1]  # what CoOp's parse_test_res.py looks at
    assert re.findall(r"\* accuracy: ([\.\deE+-]+)%", after) == [f"{100 * accuracy:.1f}"]


def test_results_have_the_keys_that_scripts_rely_on(ran: dict[str, Done], folder: Path) -> None:
    assert ran["train"].returncode == 0
    results = json.loads((folder / "run" / "results.json").read_text())
    example = {
        "trainer": "CoOp",
        "base": "CoOp",
        "stack": [],
        "dataset": "ShapesOnScenes",
        "backbone": "tiny",
        "seed": 0,
        "split": "test",
        "num_samples": 8,
        "accuracy": 0.0,
        "macro_f1": 0.0,
        "worst_group_accuracy": 0.0,
        "adjusted_average_accuracy": 0.0,
        "gap": 0.0,
        "groups": [{"class": "", "attribute": "", "num_samples": 0, "num_train": 0, "accuracy": 0.0}] * 4,
        "classes": [{"class": "", "num_samples": 0, "accuracy": 0.0}] * 2,
        "time": {"train_s": 0.0, "step_ms_median": 0.0, "test_s": 0.0},
        "peak_memory_mib": 0.0,
        "environment": {
            "torch": "",
            "oodprompt": "",
            "device": "",
            "precision": "",
            "tf32": "",
            "deterministic": True,
            "compile": "",
            "together": 1,
        },
        "checkpoint": "",
    }

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        return [shape(inner) for inner in value] if isinstance(value, list) else type(value)

    assert {key: shape(results[key]) for key in example} == shape(example)
    for key in ("dataset", "backbone", "seed", "split", "num_samples", "stack"):
        assert results[key] == example[key]
    assert 0 <= results["worst_group_accuracy"] <= results["accuracy"] <= 1
    assert Path(results["checkpoint"]) == folder / "run" / "prompt_learner" / "model.pth.tar-2"


def test_written_config_is_the_whole_one(ran: dict[str, Done], folder: Path) -> None:
    assert ran["train"].returncode == 0
    cfg = get_cfg_default()
    merge_file(cfg, folder / "run" / "config.yaml")
    assert (cfg.SEED, cfg.TRAINER.NAME, cfg.OPTIM.MAX_EPOCH, cfg.INPUT.SIZE) == (0, "CoOp", 2, (48, 48))
    assert yaml.safe_load((folder / "run" / "config.yaml").read_text()).keys() == get_cfg_default().keys()
    assert set(leaves(cfg)) == set(leaves(get_cfg_default()))


def test_evaluation_of_the_run_gives_its_result(ran: dict[str, Done], folder: Path) -> None:
    assert ran["eval"].returncode == 0, ran["eval"].stderr
    first, again = (json.loads((folder / name / "results.json").read_text()) for name in ("run", "eval"))
    same = ("accuracy", "macro_f1", "groups", "classes", "checkpoint")
    assert {key: first[key] for key in same} == {key: again[key] for key in same}


def test_a_fresh_process_says_the_same() -> None:
    """Without the fork: nothing that importing prints may join the one line."""
    argv = [sys.executable, "train.py", "--trainer", "CoOpODD"]
    done = subprocess.run(argv, check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: --trainer: unknown trainer 'CoOpODD': did you mean 'CoOpOOD'\?.*\n", done.stderr)


def test_importing_the_package_is_light() -> None:
    code = "import sys, oodprompt; print(sorted({'torch', 'numpy', 'yacs', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
