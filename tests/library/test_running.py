"""``oodprompt.train`` and ``oodprompt.load``: as the command line, from all kinds of data, leaving nothing behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from yacs.config import CfgNode

import oodprompt
from oodprompt import cli, predict
from oodprompt.config.registry import DATASET_REGISTRY, TRAINER_REGISTRY
from oodprompt.engine import device
from oodprompt.errors import UserError
from oodprompt.library.run import Run
from oodprompt.library.state import Processes, call, untouched
from oodprompt.log import logger
from tests.helpers.runs import CONFIG, command_line, no_pictures

SMALL = {
    "num_train": 80,
    "num_val": 16,
    "num_test": 24,
    "correlation": 0.8,
    "batch_size": 16,
    "epochs": 3,
    "workers": 0,
}
TINY: dict[str, Any] = {"backbone": "tiny", "epochs": 1, "batch_size": 16, "workers": 0}
Train = Callable[..., Run]


@pytest.fixture(scope="module")
def train(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``oodprompt.train`` in a new folder, without pictures."""

    def go(*words: Any, **settings: Any) -> Run:
        folder = tmp_path_factory.mktemp("library") / "run"
        with no_pictures():
            return oodprompt.train(*words, **{"output": folder, "root": data_root, **settings})

    return go


@pytest.fixture(scope="module")
def run(train: Train) -> Run:
    """A trained run; tests only read it."""
    return train("CoOpOOD", data="ShapesOnScenes", anchor="attributes", seed=2, **TINY | SMALL)


@pytest.fixture(scope="module")
def images(run: Run) -> list[str]:
    return [run.trainer.dataset.test.impath(i) for i in range(5)]


def content(folder: Path) -> dict[str, Any]:
    """results.json but for times and places."""
    results = json.loads((folder / "results.json").read_text())
    return {key: value for key, value in results.items() if key not in ("time", "peak_memory_mib", "checkpoint")}


def test_files_and_results_are_those_of_the_command_line(train: Train, data_root: Path, tmp_path: Path) -> None:
    run = train("CoOpOOD", data="ShapesOnScenes", config_file=CONFIG, anchor="attributes", seed=3, **SMALL)
    with no_pictures():
        words = ("TRAINER.COOPOOD.ANCHOR", "attributes", "SEED", 3, "DATALOADER.NUM_WORKERS", 0)
        cli.run(command_line(data_root, tmp_path / "cli", "CoOpOOD", *words))
    assert content(run.folder) == content(tmp_path / "cli")
    files = [
        {str(file.relative_to(folder)).split(".tfevents")[0] for file in folder.rglob("*")}
        for folder in (run.folder, tmp_path / "cli")
    ]
    assert files[0] == files[1]
    configs = [(folder / "config.yaml").read_text().splitlines() for folder in (run.folder, tmp_path / "cli")]
    assert [line for line in configs[0] if not line.startswith("OUTPUT_DIR")] == [
        line for line in configs[1] if not line.startswith("OUTPUT_DIR")
    ]
    assert run.evaluate().accuracy == content(run.folder)["accuracy"]


def test_results_are_tables(run: Run) -> None:
    results, stored = run.evaluate(), content(run.folder)
    assert (results.accuracy, results.worst_group) == (stored["accuracy"], stored["worst_group_accuracy"])
    assert (
        results.groups.to_dict("records") == stored["groups"]
        and results.classes.to_dict("records") == stored["classes"]
    )
    assert len(run.evaluate("train").content["groups"]) == 4
    assert run.evaluate("train").content["num_samples"] == 80 and run.evaluate("val").content["num_samples"] == 16
    assert "<img" in results._repr_html_() and "worst group" in results._repr_html_()
    with pytest.raises(UserError, match="the split is train, val or test, not 'tests'"):
        run.evaluate("tests")


def test_show_prints_outside_a_notebook(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run.evaluate().show()
    printed = capsys.readouterr().out
    assert "CoOpOOD over CoOp on ShapesOnScenes (test, 24 images): accuracy" in printed and "circle" in printed


# --- predict -----------------------------------------------------------------------------------------------------


def test_every_form_of_an_image_has_one_prediction(run: Run, images: list[str]) -> None:
    expected = run.predict(images)
    assert list(expected.columns) == ["image", "prediction", "probability", *run.classes]
    assert expected["image"].tolist() == images
    np.testing.assert_allclose(expected[run.classes].sum(axis=1), 1, atol=1e-5)
    pictures = [Image.open(path) for path in images]
    pixels = np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])
    z = run.features(images)
    assert z.shape == (5, 128) and z.dtype == np.float32
    for given in (
        pictures,
        pixels,
        list(pixels),
        torch.from_numpy(pixels),
        z,
        torch.from_numpy(3 * z),
        z.astype(float),
        list(z),
        list(torch.from_numpy(z)),
        list(torch.from_numpy(pixels)),
    ):
        found = run.predict(given)
        assert found["image"].tolist() == list("01234")
        pd.testing.assert_frame_equal(found.drop(columns="image"), expected.drop(columns="image"), atol=1e-5)
        np.testing.assert_allclose(run.features(given), z, atol=1e-5)
    one = run.predict(images[0])
    table = pd.DataFrame({"image": [*images, images[0]]}, index=list("zyxwvu"))
    for found in (run.predict(table), run.predict(table["image"])):  # a row for each, in the rows of the table
        pd.testing.assert_frame_equal(found, expected.iloc[[*range(5), 0]].set_axis(table.index), atol=1e-5)
    assert run.features([images[0]] * 2).shape == (2, 128)
    for given in (Path(images[0]), pictures[0], pixels[0], z[:1], z[0], [images[0]], np.array(images[:1])):
        assert run.predict(given)[run.classes].values == pytest.approx(one[run.classes].values, abs=1e-5)
    assert len(run.predict(z[:0])) == len(run.predict([])) == 0


def test_predictions_are_those_of_the_command(run: Run, images: list[str], tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    assert predict.main(["--model-dir", str(run.folder), "--output", str(file), *images]) == 0
    pd.testing.assert_frame_equal(pd.read_csv(file), run.predict(images), atol=1e-4, check_dtype=False)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"image": "a.png"}, "a dict is no image"),
        (pd.DataFrame({"path": ["a.png"]}), "the DataFrame has no column 'image'"),
        (3, "a int is no image; give paths, PIL images"),
        ([3, "a.png"], "a list of int, str is none of images"),
        ("no/such.png", "there is no file or folder no/such.png"),
        (pd.Series([Path(__file__).parents[2] / "docs" / "images"]), "the table has a folder among its images"),
        (np.zeros((2, 5), np.float32), "image features of this backbone have 128 entries each, not 5"),
        (np.full((2, 128), np.nan), r"a row of the image features is zero or not finite"),
        (np.zeros((2, 128), np.float32), "zero or not finite"),
        ([np.ones(128), np.ones(5)], "the rows of image features differ in length"),
        (np.zeros((4, 4), np.uint8), r"an array of uint8 \[4, 4\] is no image"),
        (np.zeros((2, 3, 8, 8), np.float32), r"an array of float32 \[2, 3, 8, 8\] is no image"),
        ([np.zeros((4, 4))], r"an array of type float64 and shape \(4, 4\) is no image"),
        (Image.new("I;16", (4, 4)), "mode I;16 has more than 8 bits"),
    ],
)
def test_what_is_no_image_is_one_clear_error(given: Any, error: str, run: Run) -> None:
    with pytest.raises(UserError, match=error) as raised:
        run.predict(given)
    assert "\n" not in str(raised.value)


def test_an_image_that_cannot_be_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot read the image"):
        run.predict(tmp_path / "a.png")


# --- load --------------------------------------------------------------------------------------------------------


def test_a_loaded_run_is_the_run(run: Run, images: list[str]) -> None:
    loaded = oodprompt.load(run.folder)
    assert loaded.evaluate().content == run.evaluate().content and loaded.folder == run.folder
    pd.testing.assert_frame_equal(loaded.predict(images), run.predict(images))
    assert "CoOpOOD over CoOp on ShapesOnScenes" in repr(loaded)


def test_what_cannot_be_loaded(tmp_path: Path, run: Run) -> None:
    with pytest.raises(UserError, match="there is no folder .*; give the output folder of a run"):
        oodprompt.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"there is no .*config\.yaml"):
        oodprompt.load(tmp_path)
    with pytest.raises(UserError, match="unknown config key 'OPTIM.LRR': did you mean 'OPTIM.LR'"):
        oodprompt.load(run.folder, keys={"OPTIM.LRR": 1})


# --- data --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame(run: Run) -> pd.DataFrame:
    """The images of the run as a table."""
    data = run.trainer.dataset
    rows = [
        {
            "image": d.impath,
            "label": d.classname,
            "split": split,
            "attribute": data.attribute_names[d.attribute],
            "mine": 1,
        }
        for split, images in (("train", data.train_x), ("val", data.val), ("test", data.test))
        for d in images
    ]
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def outcome(train: Train, frame: pd.DataFrame) -> Run:
    return train("CoOp", data=frame, root=None, **TINY)


def test_a_table_is_its_csv_file(outcome: Run, train: Train, frame: pd.DataFrame, tmp_path: Path) -> None:
    frame.to_csv(tmp_path / "mine.csv", index=False)
    by_csv = train("CoOp", data=tmp_path / "mine.csv", root=None, **TINY)
    assert content(by_csv.folder) == content(outcome.folder)
    assert outcome.evaluate().worst_group is not None and outcome.classes == ["circle", "diamond"]


def test_a_run_with_its_table_can_be_moved(outcome: Run, train: Train, frame: pd.DataFrame, tmp_path: Path) -> None:
    shutil.copytree(outcome.folder, tmp_path / "moved")
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace(str(outcome.folder), "/gone"))
    assert not Path("/gone").exists()
    moved = oodprompt.load(tmp_path / "moved")
    assert moved.evaluate().content == outcome.evaluate().content and moved.folder == tmp_path / "moved"
    again = train("CoOp", data=frame, root=None, output=tmp_path / "moved", **TINY)  # goes on, where nothing is left
    assert again.evaluate().content == outcome.evaluate().content


def test_features_in_memory_and_in_a_file(outcome: Run, train: Train, frame: pd.DataFrame, tmp_path: Path) -> None:
    z = outcome.features(frame["image"].tolist())
    arrays = {
        "image_features": z,
        "label": frame["label"].to_numpy(str),
        "split": frame["split"].to_numpy(str),
        "attribute": frame["attribute"].to_numpy(str),
    }
    run = train("CoOp", data=arrays, root=None, **TINY)
    file = oodprompt.write_features(tmp_path / "f.npz", **arrays)
    by_file = train("CoOp", data=str(file), root=None, **TINY)
    for other in (run, by_file, oodprompt.load(run.folder)):
        assert other.evaluate().content["groups"] == outcome.evaluate().content["groups"]
        np.testing.assert_allclose(other.predict(z)[other.classes], outcome.predict(z)[outcome.classes], atol=1e-5)
    assert run.cfg.DATASET.NAME == "Features"
    assert len(run.predict(frame["image"].tolist()[:2])) == 2  # images by the same backbone
    with pytest.raises(UserError, match="^discovery looks at regions of images"):
        run.discover()


def test_data_of_another_run_stay(outcome: Run, frame: pd.DataFrame, train: Train) -> None:
    before = (outcome.folder / "data.csv").read_bytes()
    with pytest.raises(UserError, match="has the data of another run, which are others; choose another folder"):
        train("CoOp", data=frame.iloc[:-1], root=None, output=outcome.folder, **TINY)
    assert (outcome.folder / "data.csv").read_bytes() == before
    again = train("CoOp", data=frame, root=None, output=outcome.folder, **TINY)  # goes on, with nothing left to train
    assert again.evaluate().content == outcome.evaluate().content


def test_a_refused_run_leaves_no_data(frame: pd.DataFrame, train: Train, tmp_path: Path) -> None:
    wrong = frame.assign(split="train")
    for data in (wrong, {"image_features": np.ones((2, 128)), "label": ["a", "b"], "split": ["train"] * 2}):
        with pytest.raises(UserError, match="split test"):
            train("CoOp", data=data, root=None, output=tmp_path / "new" / "run", **TINY)
        assert not list(tmp_path.iterdir())


def test_errors_speak_of_parameters(run: Run, train: Train) -> None:
    with pytest.raises(UserError, match="Choose another output=, or delete"):
        train("KgCoOp", data="ShapesOnScenes", output=run.folder, **TINY | SMALL)
    with pytest.raises(UserError, match="check the folder and epoch="):
        oodprompt.load(run.folder, epoch=9)
    with pytest.raises(UserError, match="^output=, onnx=, with_backbone=True, images=, resume= or --backbone-path$"):
        with call(Processes()):
            raise UserError("--output, --onnx, --with-backbone, --images, --resume or --backbone-path")


def test_folders(train: Train, frame: pd.DataFrame, tmp_path: Path) -> None:
    for i, row in frame.iterrows():
        place = tmp_path / row["split"] / row["label"]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").symlink_to(row["image"])
    run = train("ZeroshotCLIP", data=tmp_path, root=None, **TINY)
    assert run.cfg.DATASET.NAME == "Folders" and run.evaluate().worst_group is None and len(run.evaluate().groups) == 0
    assert list(run.evaluate().groups.columns)[:2] == ["class", "attribute"]
    assert "<img" in run.evaluate()._repr_html_()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (3, "a int is no data set; give a folder"),
        ("ShapesOnScene", "no folder, file or data set 'ShapesOnScene'; did you mean 'ShapesOnScenes'"),
        ("no/such/folder", "there is no folder or file .*no/such/folder; give a folder of"),
        ({"label": [0]}, r"the dict has no 'image_features' \[N, d\]; it has label"),
        (pd.DataFrame({"image": ["a"], "lable": ["b"], "split": ["c"]}), "no column 'label': did you mean 'lable'"),
        (pd.DataFrame({"image": ["a", None], "label": "b", "split": "c"}), "row 1 of the DataFrame has no image; give"),
        ({"image_features": np.eye(2), "path": "a"}, "^data=: unknown entry 'path' of the dict"),
        ({"image_features": np.eye(2), "label": [0]}, "^data=: label must have one entry for each of the 2 rows"),
        (pd.DataFrame({"image": [], "label": [], "split": []}), "the DataFrame has no rows"),
        (__file__, "is neither a csv file nor one of image features"),
        (Path(__file__).parent, "has neither folders train and test, nor a metadata.csv, nor"),
    ],
)
def test_data_that_are_none(data: Any, error: str, train: Train) -> None:
    with pytest.raises(UserError, match=error) as raised:
        train("CoOp", data=data, root=None, **TINY)
    assert "\n" not in str(raised.value)


# --- nothing stays behind ----------------------------------------------------------------------------------------


def _snapshot() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "cwd": os.getcwd(),
        "random": random.getstate(),
        "numpy": [str(part) for part in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "warnings": list(warnings.filters),
        "hook": threading.excepthook,
        "path": list(sys.path),
        "handlers": list(logger.handlers),
        "level": logger.level,
        "root handlers": list(logging.getLogger().handlers),
        "trainers": TRAINER_REGISTRY.registered_names(),
        "datasets": DATASET_REGISTRY.registered_names(),
        "processes": dict(PartialState._shared_state),
    }


@contextlib.contextmanager
def nothing_changes() -> Iterator[None]:
    before = _snapshot()
    yield
    after = _snapshot()
    assert [key for key in before if before[key] != after[key]] == []


def test_calls_leave_no_state_behind(
    train: Train, run: Run, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    PartialState._reset_state()
    calls: list[bool] = []

    def set_as_on_a_gpu(cfg: CfgNode, _: torch.device) -> None:
        calls.append(cfg.TRAIN.DETERMINISTIC)
        torch.use_deterministic_algorithms(cfg.TRAIN.DETERMINISTIC)

    monkeypatch.setattr(device, "set_torch", set_as_on_a_gpu)
    with nothing_changes():
        trained = train(
            "GroupDRO", data="ShapesOnScenes", groups="true", keys={"TRAIN.DETERMINISTIC": True}, **TINY | SMALL
        )
    with nothing_changes():
        calls.clear()
        trained.evaluate()
        trained.predict(images)
    assert calls == [True] * 2  # each call computes as the run was trained
    with nothing_changes():
        oodprompt.load(trained.folder).features(images)
    with nothing_changes(), pytest.raises(UserError):
        train("CoOp", data="ShapesOnScenes", corelation=1, **TINY)
    assert run.evaluate().accuracy > 0  # an older run works on, as the processes are its own


def test_a_generator_that_starts_inside_is_as_if_it_had_not(monkeypatch: pytest.MonkeyPatch) -> None:
    started, seeds = iter([False, True]), list[int]()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: next(started))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    torch.manual_seed(17)
    seeds.clear()
    with untouched():
        torch.random.default_generator.manual_seed(3)
    assert seeds == [17]


def test_silent_unless_asked(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "handlers", [])  # tests show messages
    monkeypatch.setenv("HOME", str(tmp_path))
    silent = train("CoOp", data="ShapesOnScenes", n_ctx=3, output="~/run", **TINY | SMALL)
    assert silent.folder == tmp_path / "run"
    silent.evaluate()
    assert silent.trainer.learner.ctx.shape[0] == 3  # and not the four words of SETTINGS
    assert capsys.readouterr() == ("", "")
    log = (silent.folder / "log.txt").read_text()
    assert "Finish training" in log and logger.handlers == []
    train("CoOp", data="ShapesOnScenes", verbose=True, **TINY | SMALL)
    assert "Finish training" in capsys.readouterr().out and logger.handlers == []


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        getattr(oodprompt, "trian")  # noqa: B009
    assert {"train", "load", "Run", "Results"} <= set(dir(oodprompt))
