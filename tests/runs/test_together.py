"""Runs that train together equal the runs alone, and what befalls one of them concerns it alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from oodprompt import cli
from oodprompt.backbones import CLIP, load_backbone
from oodprompt.engine import assembly
from oodprompt.engine.trainer import load_run
from oodprompt.errors import UserError
from oodprompt.features import views
from oodprompt.features.encoder import evaluating
from oodprompt.runs import together
from oodprompt.runs.benchmark import main
from oodprompt.runs.bundles import Bundle, bundled, saying, size_of
from oodprompt.runs.grid import TrainingRun
from oodprompt.runs.together import Part, run_together
from tests.helpers.jobs import Line, in_fork, results, wait_for
from tests.helpers.runs import CONFIG, METRICS, SMALL, command_line, no_pictures

ANCHORED = ("CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_ALPHA", "0.1")
ONE = ("OPTIM.MAX_EPOCH", "1")
EPOCHS = ("OPTIM.MAX_EPOCH", "2")
METHODS = (("CoOp",), ("CoOpOOD",), ANCHORED, ("DebiasedPT",), ("GroupDRO", "TRAINER.GROUPS", "true"))
SIXTEEN = [*METHODS, *METHODS, *METHODS, ("CoOp", "OPTIM.MAX_EPOCH", "3")]
OTHERS = (
    ("ProGrad",),
    ("CoOp", "TRAINER.COOP.CSC", "True"),
    ("KgCoOp",),
    ("CoOp", "TRAINER.COOP.CLASS_TOKEN_POSITION", "front"),
    ("JTT", "--base", "ProGrad", "TRAINER.JTT.FIRST_EPOCHS", "1"),
    ("CoOp", "TRAINER.COOP.CLASS_TOKEN_POSITION", "front", "SEED", "5"),
    ("CoOp", "TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"),
    ("CoOp", "TRAINER.COOP.CSC", "True", "SEED", "5"),
    ("CoOp", "TRAINER.PREC", "bf16", "DATALOADER.NUM_WORKERS", "2"),
    ("CoOp", "TRAINER.PREC", "bf16", "SEED", "5"),
)


def parts(root: Path, out: Path, methods: Sequence[Sequence[str]], epochs: Sequence[str] = EPOCHS) -> list[Part]:
    """A run of each method, each five with another seed, in folders 0, 1, ... of ``out``; their logs are 0.log, ...."""
    out.mkdir(exist_ok=True)
    lines = [
        command_line(root, out / str(i), name, *epochs, "SEED", 1 + i // 5, *more)
        for i, (name, *more) in enumerate(methods)
    ]
    return [Part(out / f"{i}.log", lambda line=line: cli.main(line)) for i, line in enumerate(lines)]


def alone(some: Sequence[Part]) -> list[int]:
    return [status for part in some for status in run_together([part])]


def probabilities(folder: Path) -> torch.Tensor:
    """Of the test images, by the model that was tested."""
    trainer = load_run(folder)
    with evaluating(*trainer.models()):
        return trainer.encoder.outputs("test", trainer.learner, trainer.objective.predict)[1].softmax(dim=1)


def assert_alike(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    assert {k: a[k] for k in METRICS} == {k: b[k] for k in METRICS}
    first, second = probabilities(one), probabilities(other)
    assert torch.equal(first.argmax(1), second.argmax(1))
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of runs in each call of the text tower for several."""
    sizes: list[int] = []
    init = together._Call.__init__

    def counted(self: Any, asked: Sequence[Any]) -> None:
        sizes.append(len(asked))
        init(self, asked)

    monkeypatch.setattr(together._Call, "__init__", counted)
    return sizes


@pytest.fixture(scope="module")
def sixteen(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of SIXTEEN, one after the other."""
    out = tmp_path_factory.mktemp("alone")
    with no_pictures():
        assert alone(parts(data_root, out, SIXTEEN)) == [0] * 16
    return out


def counting(patch: pytest.MonkeyPatch, module: Any, name: str, counts: Counter[str]) -> None:
    """Count the calls of a function."""
    function = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    patch.setattr(module, name, counted)


def test_sixteen_runs_equal_those_alone(
    sixteen: Path, data_root: Path, tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, encoded = Counter[str](), Counter[str]()
    counting(monkeypatch, assembly, "load_backbone", loaded)
    counting(monkeypatch, views, "rows_in_order", encoded)
    with no_pictures():
        assert run_together(parts(data_root, tmp_path, SIXTEEN)) == [0] * 16
    assert loaded == {"load_backbone": 1} and encoded == {"rows_in_order": 3}  # of train, val and test
    assert calls == [16] * 10  # the longer run then goes on alone
    for i in range(16):
        assert_alike(sixteen / str(i), tmp_path / str(i))
        log = (tmp_path / f"{i}.log").read_text()
        assert log.count("Finish training") == 1 and f"Wrote {tmp_path / str(i)}/results.json" in log


def test_other_learners_go_together_with_their_like(data_root: Path, tmp_path: Path, calls: list[int]) -> None:
    with no_pictures():
        assert alone(parts(data_root, tmp_path / "alone", OTHERS, ONE)) == [0] * len(OTHERS)
        assert not calls
        assert run_together(parts(data_root, tmp_path / "together", OTHERS, ONE)) == [0] * len(OTHERS)
    assert calls.count(2) >= 5 and not set(calls) - {2, 3}
    for i, other in enumerate(OTHERS):
        tolerance = 1e-2 if "bf16" in other else 1e-5
        assert_alike(tmp_path / "alone" / str(i), tmp_path / "together" / str(i), tolerance)


def test_nan_ends_its_run_alone(
    sixteen: Path, data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = [("CoOp", "OPTIM.LR", "1e38", "OPTIM.WARMUP_EPOCH", "0")]
    with no_pictures():
        assert run_together(parts(data_root, tmp_path, [*SIXTEEN[:3], *bad])) == [0, 0, 0, 2]
    for i in range(3):
        assert_alike(sixteen / str(i), tmp_path / str(i))
    assert "error: the loss became nan" in (tmp_path / "3.log").read_text()
    assert not (tmp_path / "3" / "results.json").exists()


def test_killed_runs_go_on_together(sixteen: Path, data_root: Path, tmp_path: Path) -> None:
    first = [tmp_path / str(i) / "prompt_learner" / "checkpoint" for i in range(4)]

    def work() -> int:
        with no_pictures():
            return max(run_together(parts(data_root, tmp_path, SIXTEEN[:4])))

    with in_fork(work) as pid:
        wait_for(first[0].exists)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not (tmp_path / "3" / "results.json").exists()
    with no_pictures():
        assert run_together(parts(data_root, tmp_path, SIXTEEN[:4])) == [0] * 4
    assert "resuming after epoch" in (tmp_path / "0.log").read_text()
    for i in range(4):
        assert_alike(sixteen / str(i), tmp_path / str(i))


def test_interrupt_ends_every_run_with_its_line(
    data_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = iter(range(100))

    def interrupted(self: Any, waiting: Any) -> Any:
        if next(answered) == 3:
            raise KeyboardInterrupt
        return answer(self, waiting)

    answer = together._Company._answer
    monkeypatch.setattr(together._Company, "_answer", interrupted)
    before = sys.stdout
    with no_pictures(), pytest.raises(KeyboardInterrupt):
        run_together(parts(data_root, tmp_path, SIXTEEN[:3]))
    assert sys.stdout is before
    for i in range(3):
        assert "interrupted; rerun the same command" in (tmp_path / f"{i}.log").read_text()


# --- the parts of it -----------------------------------------------------------------------------------------------


def texts(clip: CLIP, prefix: torch.Tensor, suffix: torch.Tensor) -> torch.Tensor:
    return clip.encode_prompts(prefix, suffix, (2, 3))


def test_each_run_has_its_own_random_numbers_and_streams(tmp_path: Path) -> None:
    clip = load_backbone("tiny")
    suffix = clip.token_embedding(torch.arange(10).view(2, 5))
    drawn: dict[int, list[Any]] = {}

    def work(seed: int) -> Callable[[], int]:
        def draw() -> int:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            numbers: list[Any] = []
            for _ in range(3):
                prefix = torch.randn(4, clip.shape.text_width, requires_grad=True)
                features = texts(clip, prefix, suffix)
                numbers.append((random.random(), np.random.rand(), torch.rand(()).item()))
                features.square().sum().backward()
                numbers.append((random.random(), np.random.rand(), torch.rand(()).item(), prefix.grad))
                print(seed)
            drawn[seed] = numbers
            return seed

        return draw

    def all_drawn(at_once: int) -> dict[int, list[Any]]:
        drawn.clear()
        some = [Part(tmp_path / f"{at_once}_{seed}", work(seed)) for seed in range(4)]
        groups = [some] if at_once == 4 else [[one] for one in some]
        assert [status for group in groups for status in run_together(group)] == [0, 1, 2, 3]
        assert [(tmp_path / f"{at_once}_{seed}").read_text() for seed in range(4)] == [f"{s}\n" * 3 for s in range(4)]
        return dict(drawn)

    state = random.getstate()
    torch.testing.assert_close(all_drawn(4), all_drawn(1), rtol=1e-4, atol=1e-4)
    assert random.getstate() == state


def test_prompts_that_differ_in_what_is_not_learned_are_encoded_apart(tmp_path: Path, calls: list[int]) -> None:
    clip = load_backbone("tiny")
    found: dict[int, torch.Tensor] = {}
    prefixes = torch.randn(4, 4, clip.shape.text_width)
    suffixes = torch.randn(2, 2, 5, clip.shape.text_width)

    def work(i: int) -> int:
        found[i] = texts(clip, prefixes[i].clone().requires_grad_(), suffixes[i // 2])
        return 0

    run_together([Part(tmp_path / str(i), lambda i=i: work(i)) for i in range(4)])
    assert calls == [2, 2]
    for i in range(4):
        torch.testing.assert_close(found[i], texts(clip, prefixes[i], suffixes[i // 2]), rtol=0, atol=1e-5)


def test_no_call_keeps_more_than_activation_gib(tmp_path: Path, calls: list[int]) -> None:
    clip = load_backbone("tiny")
    suffix = clip.token_embedding(torch.arange(10).view(2, 5))
    clip.activation_limit = 3 * 9 * clip.activation_limit // clip.tokens_at_once  # of three runs with 4 + 2 + 3 tokens

    def work() -> int:
        for _ in range(2):
            prefix = torch.randn(4, clip.shape.text_width, requires_grad=True)
            texts(clip, prefix, suffix).sum().backward()
        return 0

    assert run_together([Part(tmp_path / str(i), work) for i in range(5)]) == [0] * 5
    assert max(calls) == 3 and sum(calls) >= 8


def test_memory_that_does_not_hold_all_leaves_each_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = load_backbone("tiny")
    suffix = clip.token_embedding(torch.arange(10).view(2, 5))

    def none_left(self: Any, asked: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(together._Call, "__init__", none_left)

    def work() -> int:
        prefix = torch.randn(4, clip.shape.text_width, requires_grad=True)
        texts(clip, prefix, suffix).sum().backward()
        assert prefix.grad is not None
        return 0

    assert run_together([Part(tmp_path / str(i), work) for i in range(3)]) == [0] * 3


# --- of a grid -----------------------------------------------------------------------------------------------------


def grid_run(i: int, *words: str) -> TrainingRun:
    return TrainingRun(
        Path(f"out/{i}"), ("--config-file", CONFIG, "--seed", str(i), "--output-dir", f"out/{i}", *words)
    )


def test_runs_are_grouped_by_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodprompt.engine.arguments.check_trackers", lambda cfg: None)  # mlflow need not be there
    coop = [grid_run(i, "--trainer", "CoOp") for i in range(4)]
    over = [grid_run(10 + i, "--trainer", "GroupDRO", "TRAINER.GROUPS", "true") for i in range(2)]
    apart = [
        grid_run(20, "--trainer", "CoOp", "TRAINER.COOP.N_CTX", "2", "TRAINER.COOP.CTX_INIT", ""),
        grid_run(21, "--trainer", "MaPLe"),
        grid_run(22, "--trainer", "CoOp", "DATALOADER.FEATURE_CACHE", "off"),
        grid_run(24, "--trainer", "CoOp", "DATALOADER.FEATURE_CACHE", "disk", "INPUT.TRANSFORMS", "('random_flip',)"),
        grid_run(25, "--trainer", "CoOp", "TRAIN.TRACKERS", "('mlflow',)"),
        grid_run(23, "--trainer", "CoOp", "TRAINER.COOP.CLASS_TOKEN_POSITION", "middle"),
    ]
    jobs = bundled([*coop, *apart, *over], 4, 1)
    assert jobs == [Bundle(tuple(coop[:3])), Bundle((coop[3], *over)), *apart]
    assert saying(jobs) == "6 runs train together in 2 processes of 3; 6 more train alone (--together)"
    assert [len(job.parts) for job in bundled(coop, 16, 2)] == [2, 2]
    assert bundled(coop, 1, 2) == coop and saying(coop) == ""


def test_size_is_checked() -> None:
    assert (size_of("off"), size_of("3"), size_of("auto")) == (1, 3, 16)
    with pytest.raises(UserError, match="--together: '0' is neither"):
        size_of("0")


def test_grid_trains_together_and_says_so(line: Line, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with no_pictures():
        assert main(line("CoOp", "CoOpOOD", out="off")) == 0
        assert "train together" not in capsys.readouterr().out
        assert main(line("CoOp", "CoOpOOD", out="auto", more=["--together", "auto"])) == 0
    out = capsys.readouterr().out
    assert "4 runs train together in 1 process of 4 (--together)" in out
    assert "Training CoOpOOD-CoOp, seed 2 (4 of 4)" in out or "Training CoOpOOD, seed 2 (4 of 4)" in out
    one, other = results(tmp_path / "off"), results(tmp_path / "auto")
    assert len(one) == 4 and one == other
    for log in (tmp_path / "auto").rglob("train.log"):
        text = log.read_text()
        assert text.startswith("$ ") and text.count("Finish training") == 1
        assert str(log.parent) in text.splitlines()[0]


def test_a_run_that_fails_among_others_is_the_only_failure(
    data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.yaml"
    common = " ".join(map(str, [*SMALL, "TRAIN.VAL_FREQ", "0", *EPOCHS]))
    methods = {"CoOp": "--trainer CoOp", "too fast": "--trainer CoOp OPTIM.LR 1e38"}
    file.write_text(yaml.safe_dump({"config": CONFIG, "common": common, "methods": methods}))
    words = [
        "--seeds",
        "1",
        "2",
        "--root",
        str(data_root),
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "1",
        "--together",
        "auto",
    ]
    with no_pictures():
        assert main([str(file), *words]) == 1
    out = capsys.readouterr().out
    assert "4 runs train together in 1 process" in out and out.count("Failed: too fast") == out.count("Failed") == 2
    assert len(results(tmp_path / "out")) == 2


def test_slurm_leaves_runs_alone(
    line: Line, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[Any] = []
    monkeypatch.setattr("oodprompt.runs.benchmark.run_on_slurm", lambda todo, *_: jobs.extend(todo) or ["all"])
    main(line("CoOp", more=["--slurm", "main", "--together", "4"]))
    assert len(jobs) == 2 and all(isinstance(job, TrainingRun) for job in jobs)
    assert "Note: --together 4 is for the CPU of this machine: Slurm gives" in capsys.readouterr().out
