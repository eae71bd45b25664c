"""Classifying images of one's own with a trained model."""

from __future__ import annotations

import csv
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
def test_predictions_are_those_of_the_evaluation(run: Run, tmp_path: Path, trainer: str) -> None:
    results = run(trainer, "run", "DATASET.ATTRIBUTE_NAMES", "('water', 'land')")
    test = load_run(tmp_path / "run").dataset.test
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for i, datum in enumerate(test):
        Image.open(datum.impath).save(tmp_path / ("deep" if i % 2 else "deep/er") / f"{i}.PNG")
    (tmp_path / "deep" / "notes.txt").write_text("no image")
    out = tmp_path / "made" / "here.csv"
    predict.run(["--model-dir", str(tmp_path / "run"), "--output", str(out), str(tmp_path / "deep"), test[0].impath])
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
    assert "give the output folder of a run of train.py" in problem(tmp_path / "fine.png")
    run("ZeroshotCLIP", "run")
    (tmp_path / "broken.png").write_bytes((tmp_path / "fine.png").read_bytes()[:30])
    assert f"cannot read the image {tmp_path / 'broken.png'}" in problem(tmp_path / "fine.png", tmp_path / "broken.png")
    assert not (tmp_path / "out.csv").exists()


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
