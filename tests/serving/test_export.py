"""A trained model as a file: it predicts what the run does, and is refused where it would not."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import oodprompt
from oodprompt import predict
from oodprompt.config.extensions import register_all
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine import PromptTrainer, load_run
from oodprompt.errors import UserError
from oodprompt.serving import Classifier, command, exporting, file
from tests.helpers.runs import Build, Run

NAMES = ("DATASET.ATTRIBUTE_NAMES", "('water', 'land')")
register_all()
LEARNERS = [name for name, t in TRAINER_REGISTRY.items() if t.learner_class]
PREDICTING = [name for name, t in TRAINER_REGISTRY.items() if (d := t.debiaser_class) and (d.predicts or d.aligns)]


def of_file(trainer: PromptTrainer, with_backbone: bool = False) -> tuple[Classifier, file.Card, dict[str, Any]]:
    """The classifier of what a file would hold."""
    trainer.trained.set_mode(training=False)
    card, tensors = exporting.describe(trainer, with_backbone)
    return Classifier(card, file.build(card, tensors, "model.safetensors")), card, tensors


def images(trainer: PromptTrainer, number: int = 4) -> list[str]:
    return [trainer.dataset.test[i].impath for i in range(number)]


@pytest.mark.parametrize(
    "trainer, base",
    [(name, "") for name in LEARNERS] + [(d, b) for d in [*PREDICTING, "OrthCal+CoOpOOD"] for b in ("CoCoOp", "MaPLe")],
)
def test_every_method_predicts_from_its_file_as_in_its_run(build: Build, trainer: str, base: str) -> None:
    first, *stack = trainer.split("+")
    built = build(first, *(("--base", base) if base else ()), *NAMES, "TRAINER.STACK", str(stack))
    torch.manual_seed(0)
    with torch.no_grad():
        for model in built.models():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    if trainer == "DFR":
        built.debiasers[0].fitted.fill_(True)
    classifier, _, tensors = of_file(built)
    expected = built.classify(images(built))
    assert (classifier.probabilities(images(built)) - expected).abs().max() < 1e-6
    assert any(name.startswith("tower.") for name in tensors) == (trainer == "FineTune")


@pytest.mark.parametrize("keys", [("INPUT.TRANSFORMS", "()"), ("INPUT.TRANSFORMS", "('normalize', 'instance_norm')")])
def test_the_file_has_the_transform(build: Build, keys: tuple[str, ...]) -> None:
    built = build("ZeroshotCLIP", *keys)
    classifier, *_ = of_file(built)
    assert (classifier.probabilities(images(built)) - built.classify(images(built))).abs().max() < 1e-6


@pytest.mark.parametrize("variant", [("INFERENCE", "raw"), ("NORMALIZE_INPUT", "False")])
def test_variants_of_the_projections(build: Build, variant: tuple[str, str]) -> None:
    built = build("CoOpOOD", f"TRAINER.COOPOOD.{variant[0]}", variant[1])
    classifier, *_ = of_file(built)
    assert (classifier.probabilities(images(built)) - built.classify(images(built))).abs().max() < 1e-6


def test_a_run_becomes_a_file_and_an_onnx_model(
    run: Run, tmp_path: Path, data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run("CoOpOOD", "run", *NAMES)
    out, graph, photos = tmp_path / "made" / "model.safetensors", tmp_path / "model.onnx", tmp_path / "photos"
    assert command.main(["--model-dir", str(tmp_path / "run"), "--output", str(out), "--onnx", str(graph)]) == 0
    said = capsys.readouterr().out
    assert "largest difference between PyTorch and onnxruntime" in said and not list(tmp_path.rglob("*.part"))
    shutil.copytree(Path(images(load_run(tmp_path / "run"))[0]).parent, photos)
    (photos / "broken.png").write_bytes(b"no image")

    def table(*flags: Any) -> list[dict[str, str]]:
        csv_file = tmp_path / "out.csv"
        assert predict.main([*map(str, flags), "--output", str(csv_file), str(photos)]) == 1
        return list(csv.DictReader(csv_file.open()))

    by_run = table("--model-dir", tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    assert table("--model-file", out) == by_run
    classifier = Classifier.load(out)
    paths = [row["image"] for row in by_run if row["prediction"]]
    session = onnxruntime.InferenceSession(str(graph))
    pixels = torch.stack([classifier.pixels_of(path) for path in paths]).numpy()
    found = session.run(None, {"pixels": pixels})[0]
    wanted = np.array([[float(row[name]) for name in classifier.classnames] for row in by_run if row["prediction"]])
    assert np.abs(found - wanted).max() < 2e-4
    assert session.get_modelmeta().custom_metadata_map["classnames"] == '["circle", "diamond"]'


def test_pictures_arrays_and_paths_are_classified_alike(build: Build) -> None:
    built = build("ZeroshotCLIP")
    classifier, *_ = of_file(built)
    paths = images(built)
    pictures = [Image.open(path).convert("RGB") for path in paths]
    table = classifier.predict(paths)
    assert list(table.columns) == ["image", "prediction", "probability", "circle", "diamond"]
    assert list(table["image"]) == paths
    assert all(row["probability"] == row[row["prediction"]] for _, row in table.iterrows())
    for others in (pictures, [np.asarray(p) for p in pictures], np.stack([np.asarray(p) for p in pictures])):
        assert np.array_equal(classifier.predict(others)[["circle", "diamond"]], table[["circle", "diamond"]])
    assert len(classifier.predict(pictures[0])) == len(classifier.predict(paths[0])) == 1
    with pytest.raises(UserError, match="float64 and shape .* is no image"):
        classifier.predict([np.zeros((4, 4, 3))])
    with pytest.raises(UserError, match="cannot read the image nothing.png"):
        classifier.predict(["nothing.png"])


def test_another_backbone_is_refused(build: Build) -> None:
    _, card, tensors = of_file(build("CoCoOp"))
    for key in ("image_digest", "text_digest"):
        other = file.Card(**{**vars(card), "backbone": {**card.backbone, key: "0" * 64}})
        with pytest.raises(UserError, match="was trained on another tiny: .* digest .*, not 000000000000"):
            file.build(other, tensors, "model.safetensors")


@pytest.mark.parametrize("trainer", ["CoOp", "CoCoOp"])
def test_a_file_with_the_backbone_loads_no_other(build: Build, trainer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(trainer)
    monkeypatch.setattr(file, "load_backbone", lambda *a, **k: pytest.fail("a backbone was loaded"))
    classifier, _, tensors = of_file(built, with_backbone=True)
    assert (classifier.probabilities(images(built)) - built.classify(images(built))).abs().max() < 1e-6
    assert any(name.startswith("text.") for name in tensors) == (trainer == "CoCoOp")


def test_what_cannot_be_exported_is_refused_by_name(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("OrthCal", *NAMES)
    monkeypatch.delattr(type(built.debiasers[0]), "head")
    with pytest.raises(UserError, match="orth_?cal cannot be exported: it predicts in its own way"):
        exporting.describe(built)
    built = build("CoOp")
    monkeypatch.setattr(type(built.learner), "encode_image", lambda self, images: images, raising=False)
    with pytest.raises(UserError, match="CoOp cannot be exported: it encodes images in its own way"):
        exporting.describe(built)


def test_a_file_that_differs_from_the_run_is_not_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("OrthCal", "run", *NAMES)
    orth_cal = TRAINER_REGISTRY.get("OrthCal").debiaser_class
    monkeypatch.setattr(orth_cal, "head", lambda self, head: head)
    with pytest.raises(UserError, match="would give other probabilities than the trained model"):
        exporting.export(tmp_path / "run", tmp_path / "out" / "model.safetensors")
    assert not list((tmp_path / "out").iterdir())


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    import safetensors.torch

    (tmp_path / "text").write_text("no tensors")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "later", {"oodprompt": '{"format": 99}'})
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "cut", {"oodprompt": '{"format": 1, "lear'})
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "partly", {"oodprompt": '{"format": 1}'})
    for name, message in (
        ("none", "there is no file"),
        ("text", "cannot read"),
        ("other", "holds no trained model"),
        ("later", "has format 99"),
        ("cut", "it is damaged"),
        ("partly", "it is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            Classifier.load(tmp_path / name)
    assert predict.main(["--model-file", str(tmp_path / "other"), "--root", "x", str(tmp_path)]) == 2


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.parametrize("words", [("CoCoOp",), ("MaPLe",), ("FineTune",), ("CoOpOOD", "--base", "CoCoOp")])
def test_onnx_of_prompts_in_towers_and_of_texts_by_image(run: Run, tmp_path: Path, words: tuple[str, ...]) -> None:
    pytest.importorskip("onnxruntime")
    run(words[0], "run", *words[1:])
    found = exporting.export(tmp_path / "run", tmp_path / "model.safetensors", tmp_path / "model.onnx")
    assert found.onnx_difference is not None and found.onnx_difference < 1e-5 and found.file_difference < 1e-6


def test_a_run_from_python_exports_itself(run: Run, tmp_path: Path) -> None:
    run("CoOp", "run")
    found = oodprompt.load(tmp_path / "run").export(tmp_path / "model.safetensors")
    assert found.file_difference < 1e-6 and found.images == 24
    paths = images(load_run(tmp_path / "run"))
    expected = oodprompt.load(tmp_path / "run").predict(paths)
    table = oodprompt.Classifier.load(tmp_path / "model.safetensors").predict(paths)
    assert table.equals(expected)


def test_a_file_with_a_learner_loads_in_a_fresh_process(run: Run, tmp_path: Path) -> None:
    run("CoCoOp", "run")
    exporting.export(tmp_path / "run", tmp_path / "model.safetensors")
    program = "import sys; from oodprompt import Classifier; print(Classifier.load(sys.argv[1]).classnames)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.safetensors")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("["), done.stderr


def test_a_run_in_half_precision_is_exported_by_the_epoch_that_it_has(run: Run, tmp_path: Path) -> None:
    run("CoOp", "run", "OPTIM.MAX_EPOCH", "2", "TRAIN.CHECKPOINT_FREQ", "1", "TRAINER.PREC", "bf16")
    paths = images(load_run(tmp_path / "run"))
    tables = {}
    for epoch in (1, 2):
        loaded = oodprompt.load(tmp_path / "run", epoch=epoch)
        loaded.export(tmp_path / f"{epoch}.safetensors")
        tables[epoch] = oodprompt.Classifier.load(tmp_path / f"{epoch}.safetensors").probabilities(paths)
        trainer = load_run(tmp_path / "run", epoch, ["TRAINER.PREC", "fp32"])
        assert (tables[epoch] - trainer.classify(paths)).abs().max() < 1e-6
    assert not torch.equal(tables[1], tables[2])
