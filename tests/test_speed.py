"""The benchmark: columns, consistent times, errors in one line, tables of its lines."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from oodprompt.backbones import CLIP, CLIPShape, encode
from oodprompt.backbones.weights import OPENAI_WEIGHTS, SHAPES
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.errors import UserError
from tests.helpers.forks import Forks
from tests.helpers.runs import load_script

SMALL = ["--backbone", "tiny", "--batch", "4", "--steps", "5", "--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def step_time() -> ModuleType:
    return load_script("speed/step_time.py")


@pytest.fixture(scope="module")
def lines(step_time: ModuleType) -> str:
    """What two trainers print; each case has a process of its own, and two show the columns of all."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        step_time.run([*SMALL, "--trainer", "CoOp", "MaPLe", "--classes", "5", "OPTIM.MOMENTUM", "0.5"])
    return output.getvalue()


def test_columns(step_time: ModuleType, lines: str) -> None:
    cases = [json.loads(line) for line in lines.splitlines()]
    assert [(case["trainer"], case["classes"]) for case in cases] == [("CoOp", 5), ("MaPLe", 5)]
    for case in cases:
        assert tuple(case) == step_time.COLUMNS
        expected = {"implementation": "oodprompt", "backbone": "tiny", "batch": 4, "cache": "auto", "device": "cpu"}
        assert case.items() >= (expected | {"threads": 1, "options": "OPTIM.MOMENTUM 0.5", "steps": 5}).items()
        assert (case["n_ctx"], case["depth"]) == ((16, None) if case["trainer"] == "CoOp" else (2, 9))


def test_every_trainer_is_timed_at_every_number_of_classes(step_time: ModuleType) -> None:
    args = step_time.parser().parse_args([*SMALL, "--trainer", "CoOp", "MaPLe", "--classes", "2", "5"])
    cases = [(case["trainer"], case["classes"]) for case in step_time.plan(args, [])]
    assert cases == [("CoOp", 2), ("CoOp", 5), ("MaPLe", 2), ("MaPLe", 5)]


def test_times_and_peak_are_consistent(lines: str) -> None:
    for case in map(json.loads, lines.splitlines()):
        parts = [case[key] for key in ("image_fwd_s", "text_fwd_s", "backward_s")]
        assert (parts[0] > 0) == (case["trainer"] == "MaPLe"), "CoOp's image features are cached"
        # Parts are timed in other steps, and other programs may disturb either: units are held, and not more.
        assert min(parts[1:]) > 0 and 0.05 < sum(parts) / case["step_s"] < 20
        assert case["peak_mib"] > 50


def test_table(step_time: ModuleType, lines: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lines.jsonl").write_text(lines + json.dumps({"trainer": "CoOp", "classes": 9, "error": "a|b"}) + "\n")
    step_time.run(["--table", str(tmp_path / "lines.jsonl")])
    header, rule, *rows = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    columns = [word.strip() for word in header.strip("|").split("|")]
    assert set(rule) <= set("|-:") and len(rows) == 3 and "a\\|b" in rows[-1]
    for row, line in zip(rows[:-1], lines.splitlines(), strict=True):
        case = json.loads(line)
        cells = dict(zip(columns, (word.strip() for word in row.strip("|").split("|")), strict=True))
        assert (cells["trainer"], cells["classes"]) == (case["trainer"], str(case["classes"]))
        assert float(cells["step_s"]) == pytest.approx(case["step_s"], rel=0.01)
        assert cells["error"] == ""


def test_growth_finds_the_line(step_time: ModuleType) -> None:
    cases = [
        {"trainer": name, "classes": c, "step_s": 0.5 + slope * c, "peak_mib": 700 + 8 * c, "torch": "2"}
        for name, slope in (("CoOp", 0.25), ("MaPLe", 0.125))
        for c in (2, 10, 100)
    ]
    common, _, header, _, *rows = step_time.growth([*cases, {"trainer": "CoOp", "classes": 3, "error": "x"}]).split(
        "\n"
    )
    assert common == "torch 2"
    columns = [word.strip() for word in header.strip("|").split("|")]
    cells = [dict(zip(columns, (word.strip() for word in row.strip("|").split("|")), strict=True)) for row in rows]
    assert [(row["trainer"], row["step_s"], row["step_s per class"]) for row in cells] == [
        *(("CoOp", "0.5", "0.25"), ("MaPLe", "0.5", "0.125"))
    ]
    assert {(row["classes"], row["misfit"], row["peak_mib"], row["peak_mib per class"]) for row in cells} == {
        ("2 10 100", "0 %", "700", "8")
    }
    with pytest.raises(UserError, match="two or more"):
        step_time.growth(cases[:1])


def test_wrong_names_end_with_one_line(forks: Forks) -> None:
    done = forks.run(["speed/step_time.py", "--trainer", "CoOpp", *SMALL])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "unknown trainer 'CoOpp': did you mean 'CoOp'?" in done.stderr


def test_what_a_user_can_mend_is_an_error(step_time: ModuleType) -> None:
    args = step_time.parser().parse_args([*SMALL, "--trainer", "MaPLe", "--cache", "memory", "--classes", "2"])
    (case,) = step_time.plan(args, [])
    found = step_time.one_case.answer(case)
    assert list(found) == ["error"] and "trains the image tower" in found["error"]
    assert "StepTime" not in dict(DATASET_REGISTRY.items()), "the data set of a case is not left behind"


def test_a_killed_or_broken_process_is_an_error(step_time: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert step_time.run_apart([sys.executable, "-c", kill]) == {
        "error": "killed by SIGKILL, most likely for want of memory"
    }
    assert step_time.run_apart([sys.executable, "-c", "raise SystemExit('no good')"]) == {"error": "no good"}
    assert capsys.readouterr().err == "no good\n"


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_refused_memory_is_an_error(step_time: ModuleType, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def measure(case: dict[str, Any]) -> None:
        raise error

    monkeypatch.setattr(step_time.one_case, "measure", measure)
    assert step_time.one_case.answer({}) == {"error": "out of memory"}


def test_every_trainer_takes_the_number_of_contexts(step_time: ModuleType) -> None:
    def planned(*words: str) -> dict[str, tuple[int | None, int | None]]:
        args = step_time.parser().parse_args([*SMALL, "--trainer", "all", "--classes", "2", *words])
        return {case["trainer"]: (case["n_ctx"], case["depth"]) for case in step_time.plan(args, [])}

    asked = planned("--n-ctx", "3", "--depth", "2")
    without_depth, without_both = ("CoOp", "CoCoOp", "KgCoOp", "ProGrad", "CoOpOOD"), ("LinearProbe",)
    assert asked.items() >= {
        **dict.fromkeys(("MaPLe", "VPT", "IVLP", "PromptSRC"), (3, 2)),
        **dict.fromkeys(without_depth, (3, None)),
        **dict.fromkeys(without_both, (None, None)),
    }.items()  # fmt: skip
    assert "ZeroshotCLIP" not in asked
    upstream = {"CoOp": 16, "CoCoOp": 4, "KgCoOp": 4, "ProGrad": 4, "MaPLe": 2, "VPT": 2, "IVLP": 2, "PromptSRC": 4}
    assert {name: n_ctx for name, (n_ctx, _) in planned().items()}.items() >= upstream.items()


@pytest.mark.parametrize(
    "words, message",
    [
        (["--classes", "1001"], "--classes"),
        (["--batch", "0"], "--batch"),
        (["--n-ctx", "0"], "--n-ctx"),
        (["--backbone", "ViT-B/17"], "ViT-B/16"),
        (["--trainer", "CoOpOOD", "--base", "CoOpp"], "TRAINER.BASE"),
        (["OPTIM.LRR", "1"], "OPTIM.LR"),
        (["--table", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_what_cannot_run_is_refused_first(step_time: ModuleType, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        step_time.run(words)


def test_class_names(step_time: ModuleType) -> None:
    names = step_time.one_case.class_names(1000)
    assert len(set(names)) == 1000 and names[:10] == step_time.one_case.class_names(10)
    assert {3 <= len(encode(f"{name}.")) + 1 <= 8 for name in names} == {True}


def test_shapes_are_those_of_their_weights() -> None:
    assert list(SHAPES) == list(OPENAI_WEIGHTS)
    for shape in SHAPES.values():
        with torch.device("meta"):
            assert CLIPShape.of(CLIP(shape).state_dict()) == shape


def test_both_paths_are_timed_with_the_same_weights(capsys: pytest.CaptureFixture[str]) -> None:
    load_script("speed/backbone_paths.py").run(["--layers", "1", "--classes", "3", "--repeats", "1"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["case"] for row in rows] == ["fast", "general", "cut", "uncut"]
    assert all(row["off"] < 1e-5 and 0 < row["forward_s"] <= row["step_s"] and row["kept_mib"] >= 0 for row in rows)
