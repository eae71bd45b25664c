"""Classifying images of one's own with a trained model."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oodprompt import predict
from oodprompt.engine import load_run
from oodprompt.errors import UserError

Run = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("trainer", ["CoOpOOD", "OrthCal"])
def test_predictions_are_those_of_the_evaluation(
    run: Run, tmp_path: Path, trainer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run(trainer, "run", "DATASET.ATTRIBUTE_NAMES", "('water', 'land')")
    test = load_run(tmp_path / "run").dataset.test
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i, datum in enumerate(test):
        Image.open(datum.impath).save(tmp_path / ("deep" if i % 2 else "deep/er") / f"{i}.PNG")
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    for left in ("._1.png", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/1.png"):
        (tmp_path / "deep" / left).parent.mkdir(exist_ok=True)
        (tmp_path / "deep" / left).write_bytes(b"no image")
    out = tmp_path / "made" / "here.csv"
    predict.run(["--model-dir", str(tmp_path / "run"), "--output", str(out), str(tmp_path / "deep"), test[0].impath])
    assert "passed over 1 file that is no image: 1 .txt" in capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == len(test) + 1 and rows[-1]["image"] == test[0].impath
    right = [row["prediction"] == test[int(Path(row["image"]).stem)].classname for row in rows[:-1]]
    assert np.mean(right) == pytest.approx(results["accuracy"])
    for row in rows:
        assert float(row["circle"]) + float(row["diamond"]) == pytest.approx(1, abs=2e-4)
        assert row["probability"] == row[row["prediction"]] == max(row["circle"], row["diamond"])


def test_what_is_wrong_is_said(run: Run, tmp_path: Path) -> None:
    def problem(*words: Any) -> str:
        with pytest.raises(UserError) as error:
            predict.run(["--model-dir", str(tmp_path / "run"), "--output", str(tmp_path / "out.csv"), *map(str, words)])
        return str(error.value)

    assert problem(tmp_path / "nothing.png") == f"there is no file or folder {tmp_path / 'nothing.png'}"
    assert f"no image in {tmp_path}; images end in .jpg" in problem(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "fine.png")
    assert "give the output folder of a run" in problem(tmp_path / "fine.png")
    assert not (tmp_path / "out.csv").exists()


def test_a_file_that_is_no_image_costs_its_own_prediction_alone(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("ZeroshotCLIP", "run", "DATALOADER.TEST.BATCH_SIZE", "2")
    test = load_run(tmp_path / "run").dataset.test
    photos, out = tmp_path / "photos", tmp_path / "out.csv"
    (photos / ".ipynb_checkpoints").mkdir(parents=True)
    for i in range(3):
        Image.open(test[i].impath).save(photos / f"{i}.png")
    command = ["--model-dir", str(tmp_path / "run"), "--output", str(out), str(photos)]
    assert predict.main(command) == 0
    whole = list(csv.reader(out.open()))
    assert whole[0] == ["image", "prediction", "probability", "circle", "diamond"]

    (photos / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    for name in ("1 cut.png", "3.png", "4.png"):  # the last batch has nothing else
        (photos / name).write_bytes((photos / "0.png").read_bytes()[:30])
    (tmp_path / "notes, all.txt").write_text("no image")
    capsys.readouterr()
    assert predict.main([*command, str(tmp_path / "notes, all.txt")]) == 1
    rows = {Path(row["image"]).name: row for row in csv.DictReader(out.open())}
    assert list(rows) == ["0.png", "1 cut.png", "1.png", "2.png", "3.png", "4.png", "notes, all.txt"]
    for name, *values in ((Path(row[0]).name, *row[1:]) for row in whole[1:]):
        assert list(rows[name].values())[1:] == [*values, ""]
    for name in ("1 cut.png", "3.png", "4.png", "notes, all.txt"):
        assert list(rows[name].values())[1:5] == [""] * 4 and "cannot read the image" in rows[name]["error"]
    said = capsys.readouterr().out
    assert "\n4 files could not be read and have no prediction:\n  cannot read the image" in said and "cut.png" in said


def test_a_name_that_is_no_utf_8_is_written_readably(run: Run, tmp_path: Path) -> None:
    run("ZeroshotCLIP", "run")
    photo = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.open(load_run(tmp_path / "run").dataset.test[0].impath).save(photo)
    command = ["--model-dir", str(tmp_path / "run"), "--output", str(tmp_path / "out.csv"), str(photo)]
    assert predict.main(command) == 0
    assert r"caf\udce9.png," in (tmp_path / "out.csv").read_text(encoding="utf-8")


def test_classes_of_one_name_have_columns_of_their_own(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("ZeroshotCLIP", "run")
    monkeypatch.setattr(predict, "load_run", cranes := lambda *a, **k: _renamed(load_run(*a, **k)))
    image = cranes(tmp_path / "run").dataset.test[0].impath
    predict.run(["--model-dir", str(tmp_path / "run"), "--output", str(tmp_path / "out.csv"), image])
    [row] = csv.DictReader((tmp_path / "out.csv").open())
    assert set(row) == {"image", "prediction", "probability", "crane (class 0)", "crane (class 1)"}
    assert row["probability"] == row[row["prediction"]]


def _renamed(trainer: Any) -> Any:
    trainer.dataset.classnames = ["crane", "crane"]
    return trainer
