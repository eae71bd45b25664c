"""Results before words: what is printed or drawn ends no run and loses no result."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import shlex
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import tracking
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from oodprompt import cli
from oodprompt.backbones import is_too_long, tokenize
from oodprompt.engine.evaluation import Classification
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.log import Forgiving, logger
from tests.helpers.forks import Forks
from tests.helpers.runs import Arguments, interrupted_at

NAMES = ("鹤", "žeriav")
ONE = ("OPTIM.MAX_EPOCH", "1", "DATALOADER.NUM_WORKERS", "0")


@pytest.fixture
def birds(tmp_path: Path) -> list[str]:
    """Keys of a small data set whose names are beyond ASCII."""
    rng, rows = np.random.default_rng(0), ["image,label,split,attribute"]
    for n in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
        rows.append(f"{n}.png,{NAMES[n % 2]},{('train', 'val', 'test')[n // 4]},{('pré', 'plage')[n // 2 % 2]}")
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return ["DATASET.NAME", "CSV", "--root", str(tmp_path), *ONE]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_an_encoding_that_lacks_characters_loses_nothing(
    encoding: str, arguments: Arguments, birds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding=encoding, write_through=True))
    assert cli.main(arguments("CoOp", "out", *birds)) == 0
    shown, log = terminal.getvalue().decode(encoding), (tmp_path / "out" / "log.txt").read_text(encoding="utf-8")
    assert "* group: 鹤 / pré" in log and "* group: žeriav / plage" in log
    assert shown == log.encode(encoding, "replace").decode(encoding) != log
    assert {c["class"] for c in json.loads((tmp_path / "out" / "results.json").read_text())["classes"]} == set(NAMES)
    assert "鹤" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_messages_without_a_command_end_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii", write_through=True))
    shown = next(handler for handler in logger.handlers if type(handler).__name__ == "_Terminal")
    shown.emit(logging.makeLogRecord({"msg": "žeriav \udce9"}))  # not through pytest, which cannot pass it on
    assert terminal.getvalue() == b"?eriav ?\n"
    sys.stdout.close()
    shown.emit(logging.makeLogRecord({"msg": "nobody reads this"}))


def test_a_reader_that_leaves_does_not_end_the_run(arguments: Arguments, forks: Forks, tmp_path: Path) -> None:
    """As ``train.py ... | head -1``: the pipe breaks at the first line."""
    close = "import os\nread, write = os.pipe()\nos.dup2(write, 1)\nos.close(write)\nos.close(read)\n"
    close += "import sys\nsys.stdout.reconfigure(line_buffering=True)\n"
    process = forks.start(["train.py", *arguments("CoOp", "out", *ONE)], first=close)
    done = forks.wait(process)[0]
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "\nNote: nobody reads the output any more; the run goes on\n" in log and "* accuracy: " in log
    assert (tmp_path / "out" / "results.json").is_file()


def fails(*_: Any, **__: Any) -> None:
    raise RuntimeError("no luck\nat all")


@pytest.mark.parametrize(
    ("owner", "name", "missing"),
    [
        (FigureCanvasAgg, "print_png", ["groups.png", "training.png"]),
        (Classification, "report", ["the report"]),
        (Classification, "confusion_matrix", ["cmat.pt"]),
        (SummaryWriter, "__init__", ["TensorBoard's file"]),
        (SummaryWriter, "add_scalar", ["the rest of TensorBoard's file"]),
        (SummaryWriter, "close", ["the end of TensorBoard's file"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fails_beside_the_results_costs_a_line(
    owner: type, name: str, missing: list[str], arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = arguments("CoOp", "out", *ONE, "TEST.COMPUTE_CMAT", "True")
    monkeypatch.setattr(owner, name, fails)
    assert cli.main(command) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [line for line in log.splitlines() if "missing" in line] == [
        f"Note: {what} is missing: no luck at all" for what in missing
    ]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["num_samples"] == 24
    wrote = next(line for line in log.splitlines() if line.startswith("Wrote "))
    assert not [word for word in missing if word in wrote]


def test_results_are_whole_before_the_first_word_and_picture(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    command = arguments("CoOp", "out", *ONE)
    for owner, name in ((FigureCanvasAgg, "print_png"), (Classification, "report")):
        monkeypatch.setattr(owner, name, lambda *_, **__: seen.append((tmp_path / "out" / "results.json").is_file()))
    cli.run(command)
    assert seen == [True] * 3


class Broken(io.StringIO):
    """A stream on a full disk."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("stream", [Broken(), io.StringIO()], ids=["full", "closed"])
def test_a_stream_that_fails_is_left_alone(stream: io.StringIO) -> None:
    if not isinstance(stream, Broken):
        stream.close()
    forgiving = Forgiving(stream)
    assert forgiving.write("word") == 4 and not forgiving.is_open
    assert forgiving.write("word") == 4
    forgiving.flush()


def test_the_log_fails_and_the_run_goes_on(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    os.symlink("/dev/full", tmp_path / "out" / "log.txt")
    cli.run(arguments("ZeroshotCLIP", "out", *ONE))
    assert "Note: log.txt cannot be written any more; the run goes on" in capsys.readouterr().out
    assert (tmp_path / "out" / "results.json").is_file()


# --- folders -------------------------------------------------------------------------------------------------------


def test_a_refused_run_leaves_no_folder_of_its_own(arguments: Arguments, tmp_path: Path) -> None:
    def refused(name: str) -> None:
        with pytest.raises(UserError):
            cli.run(arguments("CoOp", name, "INPUT.SIZE", "(50, 50)"))

    refused("new/er/run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "there").mkdir()
    refused("there")
    assert "error: " in (tmp_path / "there" / "log.txt").read_text()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("kept")
    refused("theirs")
    refused("theirs/run")
    assert (tmp_path / "theirs" / "notes.txt").read_text() == "kept" and not (tmp_path / "theirs" / "run").exists()


def test_a_file_in_the_place_of_the_folder_is_one_error(arguments: Arguments, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match=f"cannot write {tmp_path}/{name}.*choose another --output-dir"):
            cli.run(arguments("CoOp", name))
    assert (tmp_path / "file").read_text() == "kept"


# --- notes ---------------------------------------------------------------------------------------------------------


def test_classes_that_the_text_encoder_cannot_tell_apart_are_named(
    arguments: Arguments, birds: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = (tmp_path / "metadata.csv").read_text(encoding="utf-8")
    for names, is_noted in ((("crane", "heron"), True), (("circle", "diamond"), False)):
        (tmp_path / "metadata.csv").write_text(
            text.replace("鹤", names[0]).replace("žeriav", names[1]), encoding="utf-8"
        )
        cli.run(arguments("ZeroshotCLIP", f"out {names[0]}", *birds, "--no-train"))
        note = "Note: the text encoder sees no difference between classes: 'crane' = 'heron'. Prompts alone"
        assert (note in capsys.readouterr().out) == is_noted


def test_captions_that_are_too_long_are_cut_and_counted(
    arguments: Arguments, birds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head, *rows = (tmp_path / "metadata.csv").read_text(encoding="utf-8").splitlines()
    words = ["chest " * (100 if n in (1, 3, 9) else 3) for n in range(12)]
    captioned = [f"{row},{text}" for row, text in zip(rows, words, strict=True)]
    (tmp_path / "metadata.csv").write_text("\n".join([f"{head},caption", *captioned]) + "\n", encoding="utf-8")
    note = "Note: 2 of 4 captions have more than the 77 tokens that the text encoder takes; their ends are cut"
    check = "Note: 2 of 4 captions of training images have more than 77 tokens"
    for name, more, words in (("out", [], note), ("check", ["--no-train"], check)):
        cli.run(arguments("FineTune", name, *birds, *more))
        assert capsys.readouterr().out.count(words) == 1
    (tmp_path / "metadata.csv").write_text(
        "\n".join([head, *(row.replace("鹤", "very " * 80) for row in rows)]), encoding="utf-8"
    )
    with pytest.raises(UserError, match="the text 'a photo of a very very .* has 8. tokens, the text encoder takes 77"):
        cli.run(arguments("CoOp", "name", *birds, "TRAINER.COOP.CTX_INIT", "a photo of a"))


def test_a_cut_text_keeps_its_end() -> None:
    short, long = tokenize(["bird " * 75, "bird " * 300], truncate=True)
    assert short.equal(long) and long[-1] == long.max() and len(long) == 77
    assert not is_too_long("bird " * 75) and is_too_long("bird " * 76) and is_too_long("鹤" * 60)


def test_a_run_that_is_to_be_longer_says_how(arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("CoOp", "a run", *ONE))
    first = json.loads((tmp_path / "a run" / "results.json").read_text())
    model = tmp_path / "a run" / "prompt_learner" / "model.pth.tar-1"
    longer = [*ONE, "OPTIM.MAX_EPOCH", "3"]
    for command in (
        arguments("CoOp", "a run", *longer),
        arguments("CoOp", "b", *longer, "--resume", tmp_path / "a run"),
    ):
        with pytest.raises(UserError, match="OPTIM.MAX_EPOCH was 1, now 3.*To train its model for 2 more") as error:
            cli.run(command)
        assert (", without --resume" in str(error.value)) == ("--resume" in command)
    words = shlex.split(str(error.value).rsplit(": ", 1)[1])
    assert words == [
        "--output-dir",
        f"{tmp_path / 'a run'}-3",
        "MODEL.INIT_WEIGHTS",
        str(model),
        "OPTIM.MAX_EPOCH",
        "2",
    ]
    cli.run([*arguments("CoOp", "a run", *longer), *words])
    assert (tmp_path / "a run-3" / "prompt_learner" / "model.pth.tar-2").is_file()
    assert json.loads((tmp_path / "a run" / "results.json").read_text()) == first
    with pytest.raises(UserError) as error:
        cli.run(arguments("CoOp", "a run", *longer, "OPTIM.LR", "0.1"))
    assert "INIT_WEIGHTS" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("OPTIM.LR", "nan", "OPTIM.LR: nan is not possible; give 0 or more"),
        ("INPUT.GN_MEAN", "NaN", "GN_MEAN: nan is not"),
    ],
)
def test_nan_is_no_value(arguments: Arguments, key: str, value: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        cli.run(arguments("CoOp", "out", key, value))


class Recorded:
    """A tracker as accelerate has them, which keeps what it is told."""

    told: list[tuple[str, Any]] = []

    def __init__(self, **options: Any) -> None:
        self.told.append(("options", options))

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.told.append(("keys", values))

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append(("log", (*values.items(), step)))

    def finish(self) -> None:
        self.told.append(("finish", None))


def test_trackers_of_accelerate_get_the_curves(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorded.told.clear()
    hook = threading.excepthook
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorded)
    monkeypatch.setattr("oodprompt.engine.arguments.check_trackers", lambda cfg: None)  # it need not be there
    more = (*ONE, "TRAIN.PRINT_FREQ", "1", "TRAIN.TRACKERS", "('tensorboard', 'wandb')")
    assert cli.main(arguments("CoOp", "out", *more)) == 0
    kinds = [kind for kind, _ in Recorded.told]
    assert kinds[:2] == ["options", "keys"] and kinds[-1] == "finish" and kinds.count("finish") == 1
    assert Recorded.told[0][1]["run_name"] == "oodprompt" and Recorded.told[1][1]["TRAINER.NAME"] == "CoOp"
    logged = [value for kind, value in Recorded.told if kind == "log"]
    assert {entry[0][0] for entry in logged} >= {"train/loss", "train/lr", "train_epoch/loss"}
    steps = [step for (tag, _), step in logged if tag == "train/loss"]
    assert steps == list(range(5)), logged
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    monkeypatch.setattr(PromptTrainer, "forward_backward", interrupted_at(0, 2))
    assert cli.main(arguments("CoOp", "broken off", *more)) == 1
    assert [kind for kind, _ in Recorded.told].count("finish") == 2 and threading.excepthook is hook


@pytest.mark.parametrize("method, what", [("__init__", ""), ("log", "the rest of "), ("finish", "the end of ")])
def test_a_tracker_that_fails_costs_a_line(
    method: str, what: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Recorded)
    monkeypatch.setattr("oodprompt.engine.arguments.check_trackers", lambda cfg: None)  # it need not be there
    monkeypatch.setattr(Recorded, method, fails)
    assert cli.main(arguments("CoOp", "out", *ONE, "TRAIN.TRACKERS", "mlflow")) == 0
    log = (tmp_path / "out" / "log.txt").read_text()
    lines = [line for line in log.splitlines() if "missing" in line]
    assert lines == [f"Note: {what}the record of mlflow is missing: no luck at all"]
    assert (tmp_path / "out" / "results.json").is_file() and not (tmp_path / "out" / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(arguments("CoOp", "out", *ONE, "TRAIN.TRACKERS", "wandb")) == 2
    assert "pip install 'oodprompt[wandb]'" in capsys.readouterr().err
    assert cli.main(arguments("CoOp", "out", *ONE, "TRAIN.TRACKERS", "wand")) == 2
