"""The command line as a user meets it: what a run writes, and what it says when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from oodprompt import cli
from oodprompt.backbones.weights import embedded_file
from oodprompt.config import extensions
from oodprompt.data.dataset import DatasetBase
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from tests.helpers.forks import Forks
from tests.helpers.runs import CONFIG, REPOSITORY

Run = Callable[..., dict[str, Any]]
Arguments = Callable[..., list[str]]


@pytest.mark.pictures
def test_a_run_writes_what_the_interface_promises(run: Run, tmp_path: Path) -> None:
    results = run("CoOpOOD", "run", "TEST.COMPUTE_CMAT", True, "TEST.PER_CLASS_RESULT", True)
    folder = tmp_path / "run"
    promised = ["log.txt", "config.yaml", "results.json", "results.md", "groups.png", "training.png", "cmat.pt"]
    promised += [
        f"{model}/{file}" for model in ("prompt_learner", "coopood") for file in ("model.pth.tar-3", "checkpoint")
    ]
    assert [name for name in promised if not (folder / name).is_file()] == []
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    required = {
        *("trainer", "base", "stack", "dataset", "backbone", "seed", "split", "num_samples", "accuracy", "macro_f1"),
        *("worst_group_accuracy", "adjusted_average_accuracy", "gap", "groups", "classes", "time", "peak_memory_mib"),
        *("environment", "checkpoint", "notes", "num_without_attribute"),
    }
    assert required <= results.keys()
    assert (results["trainer"], results["base"], results["stack"]) == ("CoOpOOD", "CoOp", [])
    assert (results["dataset"], results["backbone"], results["seed"], results["split"]) == (
        "ShapesOnScenes",
        "tiny",
        1,
        "test",
    )
    assert results["num_samples"] == 24 and len(results["groups"]) == 4 and len(results["classes"]) == 2
    assert results["gap"] == pytest.approx(results["accuracy"] - results["worst_group_accuracy"])
    assert results["worst_group_accuracy"] == min(g["accuracy"] for g in results["groups"])
    assert Path(results["checkpoint"]).is_file()
    for name in ("groups.png", "training.png"):
        Image.open(folder / name).verify()
    saved = checkpoint.load(folder / "prompt_learner" / "model.pth.tar-3")
    assert {"state_dict", "epoch", "optimizer", "scheduler", "val_result"} <= saved.keys() and saved["epoch"] == 3
    assert torch.load(folder / "cmat.pt", weights_only=True).shape == (2, 2)
    log = (folder / "log.txt").read_text()
    for line in ("=> result\n", "* accuracy: ", "* worst_group: ", "=> per-class result", "Finish training"):
        assert line in log


def test_config_of_a_run_reruns_it(run: Run, tmp_path: Path) -> None:
    first = run("CoOp", "first")
    config = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(config.read_text())["TRAINER"]["NAME"] == "CoOp"
    cli.run(["--config-file", str(config), "--output-dir", str(tmp_path / "second")])
    second = json.loads((tmp_path / "second" / "results.json").read_text())
    assert (first["accuracy"], first["groups"]) == (second["accuracy"], second["groups"])


def test_seeds_differ_and_repeat(run: Run, tmp_path: Path) -> None:
    def context(name: str, seed: int) -> torch.Tensor:
        run("CoOp", name, "--seed", seed, "TRAINER.COOP.CTX_INIT", "")
        return checkpoint.load(checkpoint.file_of(tmp_path / name, "prompt_learner", 3))["state_dict"]["ctx"]

    assert torch.equal(context("a", 0), context("b", 0))
    assert not torch.equal(context("c", 1), context("a2", 0))


def test_best_on_validation_is_deployed(run: Run, tmp_path: Path) -> None:
    results = run("CoOp", "best", "TEST.FINAL_MODEL", "best_val", "OPTIM.LR", 0.5)
    assert results["checkpoint"].endswith("model-best.pth.tar")
    history = checkpoint.load(checkpoint.file_of(tmp_path / "best", "prompt_learner", 3))["oodprompt"]["history"]
    values = [row["val_worst_group_accuracy"] for row in history]
    assert results["best_epoch"] == 1 + values.index(max(values))


def test_cached_features_train_as_images_do(run: Run, tmp_path: Path) -> None:
    run("CoOp", "cached")
    run("CoOp", "images", "DATALOADER.FEATURE_CACHE", "off")
    a, b = (
        checkpoint.load(checkpoint.file_of(tmp_path / d, "prompt_learner", 3))["state_dict"]["ctx"]
        for d in ("cached", "images")
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_evaluation_is_cached_though_training_is_random(build: Callable[..., PromptTrainer]) -> None:
    trainer = build("CoOp", "INPUT.TRANSFORMS", "('random_flip', 'normalize')")
    assert trainer.encoder.batches("train") is trainer.train_loader_x
    assert trainer.encoder.batches("val") is not trainer.val_loader and "image_features" in next(
        iter(trainer.encoder.batches("val"))
    )


def test_tensorboard_has_every_epoch_once_after_a_resume(arguments: Arguments, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = arguments("CoOp", "board", "OPTIM.MAX_EPOCH", 4, "TRAIN.PRINT_FREQ", 1)
    args = cli.build_parser().parse_intermixed_args(flags)
    trainer = build_trainer(cli.setup_cfg(args))
    trainer.before_train()
    for trainer.epoch in range(2):  # noqa: B020
        trainer.before_epoch()
        trainer.run_epoch()
        trainer.after_epoch()
    trainer.epoch = 2
    trainer.before_epoch()
    trainer.run_epoch()  # written to TensorBoard, but stopped before its checkpoint
    trainer.progress.close()
    cli.run(flags)
    events = EventAccumulator(str(tmp_path / "board" / "tensorboard")).Reload()
    for tag in ("train_epoch/loss", "train_epoch/acc", "val/accuracy", "val/worst_group_accuracy"):
        assert [event.step for event in events.Scalars(tag)] == [4, 9, 14, 19]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(20))


def test_the_file_at_path_is_named_as_the_backbone(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.pt.gz"
    copy.write_bytes(embedded_file("tiny").read_bytes())
    assert run("ZeroshotCLIP", "path", "MODEL.BACKBONE.PATH", copy)["backbone"] == str(copy)


def test_several_views_are_cached(build: Callable[..., PromptTrainer]) -> None:
    keys = ["INPUT.TRANSFORMS", "('random_flip', 'normalize')"]
    assert build("CoOp", *keys).encoder.views == 0
    trainer = build("CoOp", *keys, "INPUT.VIEWS", 3)
    views = trainer.encoder.batches("train").features
    assert views.shape[0] == 3 and not torch.equal(views[0], views[1])


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_other_optimisers_and_precisions(run: Run, name: str) -> None:
    assert 0 <= run("CoOp", name, "OPTIM.NAME", name, "TRAINER.PREC", "bf16")["accuracy"] <= 1


def test_amp_on_a_cpu_computes_in_fp32_and_says_so(run: Run, tmp_path: Path) -> None:
    run("CoOp", "amp", "TRAINER.PREC", "amp")
    assert "on the CPU this run computes in fp32" in (tmp_path / "amp" / "log.txt").read_text()


def test_few_shot_and_base_classes(build: Callable[..., PromptTrainer]) -> None:
    trainer = build("CoOp", "DATASET.NUM_SHOTS", 4)
    assert len(trainer.dataset.train_x) == 8 and len(trainer.dataset.val) == 16
    classes = "('circle', 'diamond', 'star')"
    scenes = "('water', 'land', 'sky')"
    keys = ["DATASET.SHAPES.CLASSES", classes, "DATASET.SHAPES.SCENES", scenes, "DATASET.SUBSAMPLE_CLASSES"]
    assert build("CoOp", *keys, "base").dataset.classnames == ["circle", "diamond"]
    with pytest.raises(UserError, match="has one class only .'star'."):
        build("CoOp", *keys, "new")


@pytest.mark.parametrize(("trainer", "times"), [("CoOp", 2), ("ZeroshotCLIP", 1)])
def test_what_to_mind_of_the_data_stays_with_the_results(run: Run, tmp_path: Path, trainer: str, times: int) -> None:
    results = run(trainer, "run", "DATASET.SHAPES.CORRELATION", 1.0, "OPTIM.MAX_EPOCH", 1)
    (note, _), start = results["notes"], "The attribute is the class in training: every class has one value"
    assert note.startswith(start) and results["num_without_attribute"] == 0
    assert (tmp_path / "run" / "log.txt").read_text().count(f"Note: {note}\n") == times
    assert f"- {note}\n" in (tmp_path / "run" / "results.md").read_text()


def test_test_images_are_enough_for_what_does_not_train(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_training = run("ZeroshotCLIP", "all")
    run("CoOp", "trained", "OPTIM.MAX_EPOCH", 1)
    build = DatasetBase.__init__
    monkeypatch.setattr(DatasetBase, "__init__", lambda self, cfg, train, val, test: build(self, cfg, [], [], test))
    results = run("ZeroshotCLIP", "test only")
    assert results["accuracy"] == with_training["accuracy"] and results["groups"][0]["num_train"] == 0
    assert results["adjusted_average_accuracy"] == results["accuracy"]
    assert run("CoOp", "evaluated", "--eval-only", "--model-dir", tmp_path / "trained")["num_samples"] == 24
    with pytest.raises(UserError, match="^ShapesOnScenes has no training images, and CoOp trains: train on another"):
        run("CoOp", "untrained")


def test_nan_loss_stops_with_one_line_and_keeps_the_last_epoch(arguments: Arguments, run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss became (nan|inf) in epoch \d.*OPTIM.LR"):
        cli.run(arguments("CoOp", "nan", "OPTIM.LR", 1e38, "OPTIM.WARMUP_EPOCH", 2, "OPTIM.MAX_EPOCH", 6))
    epoch = checkpoint.newest_epoch(tmp_path / "nan", ["prompt_learner"])
    state = checkpoint.load(checkpoint.file_of(tmp_path / "nan", "prompt_learner", epoch))["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_weights_that_overflow_in_the_last_step_are_not_saved(arguments: Arguments, tmp_path: Path) -> None:
    """The loss was finite in every step, but the update after the epoch's last one was not."""
    one_step = [
        "DATALOADER.TRAIN_X.BATCH_SIZE",
        80,
        "OPTIM.WARMUP_EPOCH",
        1,
        "OPTIM.LR",
        1e38,
        "OPTIM.WEIGHT_DECAY",
        1e4,
    ]
    with pytest.raises(UserError, match=r"ctx is no longer finite after epoch 2; this epoch is not saved"):
        cli.run(arguments("CoOp", "overflow", *one_step))
    state = checkpoint.load(checkpoint.file_of(tmp_path / "overflow", "prompt_learner", 1))["state_dict"]
    assert all(torch.isfinite(value).all() for value in state.values())


def test_truncated_training_image_is_named(arguments: Arguments, tmp_path: Path) -> None:
    root = tmp_path / "own"
    flags = arguments("CoOp", "torn")
    flags[flags.index("--root") + 1] = str(root)
    cli.run([*flags, "--no-train"])
    victim = sorted(root.rglob("train_*.png"))[5]
    victim.write_bytes(victim.read_bytes()[:300])
    for workers in ("0", "2"):
        with pytest.raises(UserError, match=f"cannot read the image .*{victim.name}"):
            cli.run([*flags, "DATALOADER.NUM_WORKERS", workers])
    victim.unlink()
    with pytest.raises(UserError, match=f"line 7 names .*{victim.name}"):
        cli.run(flags)


@pytest.mark.parametrize(
    ("trainer", "keys", "message"),
    [
        ("CoOpODD", [], "did you mean 'CoOpOOD'"),
        ("CoOpOOD", ["--base", "CoOpOOD"], "is a debiaser, not a prompt learner"),
        ("CoOp", ["TRAINER.STACK", "('CoOp',)"], "is a prompt learner; debiasers are"),
        ("CoOpOOD", ["TRAINER.STACK", "('CoOpOOD',)"], "two models are named"),
        ("CoOp", ["DATASET.NAME", "ShapeOnScenes"], "did you mean 'ShapesOnScenes'"),
        ("CoOp", ["--backbone", "ViT-B16"], "did you mean 'ViT-B/16'"),
        ("CoOp", ["INPUT.SIZE", "(224, 224)"], "the backbone takes 48 x 48"),
        ("CoOp", ["TRAINER.COOP.NCTX", "4"], "did you mean 'TRAINER.COOP.N_CTX'"),
        ("CoOp", ["TRAINER.PREC", "fp8"], "unknown precision"),
        ("CoOp", ["OPTIM.LR", "-1.0"], "OPTIM.LR: -1.0 is not possible; give 0 or more"),
        ("CoOp", ["OPTIM.SGD_NESTEROV", "True", "OPTIM.MOMENTUM", "0"], "OPTIM: sgd does not take these values"),
        ("CoOpOOD", ["TRAINER.COOPOOD.MIN_PER_CLASS", "1"], "MIN_PER_CLASS"),
        ("CoOp", ["DATASET.SHAPES.CLASSES", "('circle', 'hexagon')"], "there is no 'hexagon'"),
        ("CoOp", ["DATALOADER.FEATURE_CACHE", "memory", "INPUT.TRANSFORMS", "('random_flip', 'normalize')"], "INPUT.VIEWS"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(arguments: Arguments, trainer: str, keys: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        cli.run(arguments(trainer, "mistake", *keys))


def test_stacked_prediction_conflict_is_refused(build: Callable[..., PromptTrainer], monkeypatch: Any) -> None:
    from oodprompt.trainers.coop_ood import DecoupledProjections

    from oodprompt.config.registry import TRAINER_REGISTRY

    class Other(DecoupledProjections):
        model_name = "other"

    trainer = type("OtherOOD", (PromptTrainer,), {"debiaser_class": Other})
    monkeypatch.setitem(TRAINER_REGISTRY._objects, "OtherOOD", trainer)
    with pytest.raises(UserError, match="each replace the prediction"):
        build("CoOpOOD", "TRAINER.STACK", "('OtherOOD',)")


def test_unexpected_errors_keep_their_traceback(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(cli, "run", lambda argv: 1 / 0)
    assert cli.main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_documented_command_names_everything_itself(tmp_path: Path, forks: Forks) -> None:
    """configs/.../tiny_shapes.yaml with no other flag than the trainer, from another working directory's output."""
    command = ["train.py", "--trainer", "CoOpOOD", "--config-file"]
    command += [str(REPOSITORY / "configs/trainers/CoOpOOD/tiny_shapes.yaml"), "OPTIM.MAX_EPOCH", "1"]
    command += ["DATASET.SHAPES.NUM_TRAIN", "40", "DATASET.SHAPES.NUM_VAL", "8", "DATASET.SHAPES.NUM_TEST", "8"]
    done = forks.run(command, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output/ShapesOnScenes/CoOpOOD-CoOp/tiny_shapes/seed1/results.json").is_file()


def small_csv(folder: Path, labels: str) -> list[str]:
    """Twelve images with these labels, in a csv file; the flags that read them."""
    folder.mkdir()
    rows = ["image,label,split"]
    for i, label in enumerate(labels):
        Image.new("RGB", (48, 48), (20 * i, 250 - 20 * i, 90)).save(folder / f"{i}.png")
        rows.append(f"{i}.png,{label},{'train' if i < 8 else 'test'}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    data = REPOSITORY / "configs/datasets/csv.yaml"
    return ["--root", str(folder), "--dataset-config-file", str(data), "DATASET.VAL_PERCENT", "0.0"]


def test_other_data_of_the_same_name_are_not_taken_for_these(tmp_path: Path) -> None:
    flags = ["--trainer", "CoOp", "--config-file", CONFIG, "--output-dir", str(tmp_path / "out")]
    keys = ["DATASET.NAME", "CSV", "OPTIM.MAX_EPOCH", "1", "DATALOADER.TRAIN_X.BATCH_SIZE", "4"]
    cli.run([*flags, *small_csv(tmp_path / "one", "abababababab"), *keys])
    first = (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(UserError, match="is of another run: the training or validation data are others"):
        cli.run([*flags, *small_csv(tmp_path / "two", "babababababa"), *keys])
    assert (tmp_path / "out" / "results.json").read_text() == first
    (tmp_path / "one").rename(tmp_path / "moved")
    cli.run([*flags, "--root", str(tmp_path / "moved"), *small_csv(tmp_path / "three", "abababababab")[2:], *keys])


def test_results_of_another_method_are_not_overwritten(run: Run, tmp_path: Path) -> None:
    run("CoOp", "run")
    before = (tmp_path / "run" / "results.json").read_text()
    with pytest.raises(UserError, match="results of another run .trainer 'CoOp', not 'ZeroshotCLIP'.*--output-dir"):
        run("ZeroshotCLIP", "run")
    assert (tmp_path / "run" / "results.json").read_text() == before
    run("ZeroshotCLIP", "other")
    run("ZeroshotCLIP", "other", "DATASET.TEMPLATE", "a {}.")


def test_no_train_reads_every_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--trainer", "CoOp", "--config-file", CONFIG, "--output-dir", str(tmp_path / "out"), "--no-train"]
    flags += [*small_csv(tmp_path / "data", "abababababab"), "DATASET.NAME", "CSV"]
    cli.run(flags)
    out = capsys.readouterr().out
    assert "Note: 12 of 12 images (100.0%) show one constant colour: " in out and "all 12 images can be read" in out
    for i in (3, 11):
        file = tmp_path / "data" / f"{i}.png"
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError) as error:
        cli.run(flags)
    assert [line.split("/")[-1].split(":")[0] for line in str(error.value).splitlines()] == ["3.png", "11.png"]


def test_an_edited_method_is_noticed(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"_done": set(), "_digests": {}}.items():
        monkeypatch.setattr(extensions, name, value)
    monkeypatch.setenv(extensions.ENVIRONMENT, "")
    mine = tmp_path / "mine.py"
    line = ["--import", str(mine), *arguments("CoOp", "run")]
    mine.write_text("x = 1")
    cli.run(line)
    cli.run(line)
    assert "mine.py" not in capsys.readouterr().out.replace(str(mine), "")
    mine.write_text("x = 2")
    extensions._done.clear()
    cli.run(line)
    assert f"Note: mine.py has changed since this run was trained; delete {tmp_path / 'run'}" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` leaves it
    command = [sys.executable, str(REPOSITORY / "train.py"), "--list"]
    shown = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (shown.returncode, shown.stderr) == (0, "")
