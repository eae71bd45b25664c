"""speed/gpu.sh and its cases, without a GPU: what it runs, bounds, leaves out and sums up."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import SHAPES
from oodprompt.errors import UserError
from tests.helpers.runs import REPOSITORY, load_script

UPSTREAM = os.environ.get("OODPROMPT_UPSTREAM", "")  # a folder with upstream's checkouts, for the slow test


@pytest.fixture(scope="module")
def gpu_cases() -> ModuleType:
    return load_script("speed/gpu_cases.py")


@pytest.fixture
def scripts() -> dict[str, ModuleType]:
    return {name: load_script(f"speed/{name}.py") for name in ("step_time", "upstream", "encode_time")}


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# --- the plan ----------------------------------------------------------------------------------------------------


def test_all_cases_take_less_than_nine_minutes(gpu_cases: ModuleType) -> None:
    cases = gpu_cases.cases(small=False, device="cuda", upstream="folder")
    assert sum(case.limit for case in cases) <= gpu_cases.TOTAL_SECONDS < 9 * 60
    assert [case.name for case in cases][:4] == ["doctor", "tests", "tests by the clock", "CoOp"]
    assert len({case.name for case in cases}) == len(cases)
    without = gpu_cases.cases(small=False, device="cuda")
    assert [case.name for case in cases if case not in without] == [
        f"{n} beside upstream" for n in ("CoOp", "CoCoOp", "MaPLe")
    ]


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_programs_take_the_words_of_their_cases(
    gpu_cases: ModuleType,
    scripts: dict[str, ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    small: bool,
    device: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = []
    for case in gpu_cases.cases(small, device, "folder"):
        program, *words = case.words
        if program == "speed/step_time.py":
            step_time = scripts["step_time"]
            flags, opts = step_time.split_off_keys(words)
            args = step_time.parser().parse_args(flags)
            assert args.together and args.device == device
            settings += step_time.plan(args, opts)
        elif program.startswith("speed/"):
            args = scripts[Path(program).stem].parser().parse_args(words)
            assert args.device == device
    names = {case["trainer"] for case in settings}
    assert names == {"CoOp", "KgCoOp", "CoCoOp", "MaPLe", "PromptSRC", "CoOpOOD", "DebiasedPT", "RaVL"}
    assert {"TRAINER.COOPOOD.ANCHOR attributes", ""} == {c["options"] for c in settings if c["trainer"] == "CoOpOOD"}
    assert {case["compile"] for case in settings} == {"off", "graphs"}
    if small:
        assert {case["backbone"] for case in settings} == {"tiny"} and max(case["classes"] for case in settings) < 4
    else:
        assert {case["backbone"] for case in settings} == {"ViT-B/16", "ViT-L/14"}
        assert {case["classes"] for case in settings} == {2, 10, 100, 1000}
        batches = {(case["trainer"], case["batch"]) for case in settings}
        assert batches >= {("CoCoOp", 1), ("CoCoOp", 32), ("MaPLe", 4), ("MaPLe", 32)}


def test_the_page_names_every_case_with_its_limit(gpu_cases: ModuleType) -> None:
    page = (REPOSITORY / "docs/gpu.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \|[^|]+\| (\d+) \|$", page, re.MULTILINE)
    cases = gpu_cases.cases(small=False, device="cuda", upstream="folder")
    assert sum(int(limit) for _, limit in rows) == sum(case.limit for case in cases)
    assert all(any(name in case.name for case in cases) for names, _ in rows for name in names.split(", "))
    assert f"{gpu_cases.TOTAL_SECONDS} seconds" in page


def test_modules_that_are_not_there_are_named(gpu_cases: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_cases.missing() == []
    monkeypatch.setattr(gpu_cases.importlib.util, "find_spec", lambda name: None if name in ("yacs", "clip") else name)
    assert [gpu_cases.PACKAGES[name] for name in gpu_cases.missing()] == ["clip-anytorch", "yacs"]
    head = (REPOSITORY / "speed/gpu.sh").read_text().split("set -uo")[0]
    named = {name for line in head.splitlines() for name in re.split(r"[\s,;]+", line)}
    assert set(gpu_cases.PACKAGES.values()) <= named


# --- the script --------------------------------------------------------------------------------------------------


def script(folder: Path, plan: list[tuple[str, ...]], *words: str, gpus: int = 1) -> list[str]:
    """The command of gpu.sh with a plan of its own, of (name, limit, file, what it lacks, program text)."""
    rows = "".join("\t".join((*row[:4], f"-c {shlex.quote(row[4])}")) + "\n" for row in plan)
    (folder / "plan").write_text(rows)
    python = folder / "python"
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'case "$*" in *device_count*) echo {gpus} ;; *"gpu_cases.py missing"*) ;; *"gpu_cases.py plan"*) cat {folder}/plan ;;\n'
        f'*) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    return ["env", f"PYTHON={python}", "bash", str(REPOSITORY / "speed/gpu.sh"), *words]


def test_every_case_is_bounded_and_summed_up(tmp_path: Path) -> None:
    step = json.dumps({"trainer": "CoOp", "classes": 2, "step_s": 0.0125, "device": "a card", "torch": "2"})
    plan = [
        ("good", "60", "steps.jsonl", "-", f"print('''{step}''')"),
        ("bad", "60", "steps.jsonl", "-", "import sys; sys.exit('went wrong')"),
        ("long", "1", "encoding.jsonl", "-", 'import time; print(\'{"what": "pixels"}\', flush=True); time.sleep(60)'),
        ("poor", "60", "steps.jsonl", "yacs", "print('{}')"),
    ]
    done = subprocess.run(script(tmp_path, plan, "out"), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    cases = {case["case"]: case["status"] for case in lines((out / "cases.jsonl").read_text())}
    assert cases == {
        "good": "ok",
        "bad": "exit status 1",
        "long": "stopped at its limit",
        "poor": "left out: no yacs",
    }
    assert [line["step_s"] for line in lines((out / "steps.jsonl").read_text())] == [0.0125]
    assert "== bad\nwent wrong\n" in (out / "log.txt").read_text()
    summary = (out / "summary.md").read_text()
    assert "Measured on: a card." in summary and "| CoOp | 2 | 12.5 |" in summary and "| pixels |" in summary
    assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_script_sums_up_what_there_is(tmp_path: Path, sent: signal.Signals) -> None:
    text = 'import os, time; print(\'{"what": "matmul", "workers": %d}\' % os.getpid(), flush=True); time.sleep(60)'
    command = script(tmp_path, [("long", "60", "encoding.jsonl", "-", text)], "out")
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a program in the background is born deaf to it
    try:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, was)
    file = tmp_path / "out" / "encoding.jsonl"
    deadline = time.monotonic() + 60
    while not (file.is_file() and file.read_text().endswith("\n")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == 128 + sent
    assert "| matmul |" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(lines(file.read_text())[0]["workers"], 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no folder OUT"),
        (["out", "--device", "tpu"], "--device is cpu or cuda"),
        (["out", "--smal"], "unknown option --smal"),
        (["out"], "torch sees no GPU here"),
    ],
)
def test_what_cannot_run_is_said_in_one_line(tmp_path: Path, words: list[str], message: str) -> None:
    command = script(tmp_path, [], *words, gpus=0)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_tests_are_counted_as_far_as_they_ran(gpu_cases: ModuleType) -> None:
    one = "tests/gpu/test_a.py::test_x PASSED [ 50%]\ntests/gpu/test_a.py::test_y[a-b] FAILED [100%]\n"
    several = "[gw0] [ 10%] PASSED tests/gpu/test_a.py::test_z \n[gw1] [ 20%] SKIPPED tests/gpu/test_b.py::test_u \n"
    failed = "FAILED tests/gpu/test_a.py::test_y[a-b] - assert 1 == 2\n"
    found = gpu_cases.tests_of(one + several + failed)
    assert found == "2 passed, 1 failed, 0 error, 1 skipped.\n- FAILED tests/gpu/test_a.py::test_y[a-b] - assert 1 == 2"


# --- the programs ------------------------------------------------------------------------------------------------


def test_images_are_encoded_from_memory_and_from_files(
    scripts: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--backbone tiny --images 4 --batch 2 --repeat 2 --matmul 16 --seconds 0.001 --workers 0 2 --device cpu"
    scripts["encode_time"].run([*words.split(), "--precision", "fp32"])
    found = lines(capsys.readouterr().out)
    assert [(line["what"], line.get("workers"), line.get("images")) for line in found] == [
        *(("matmul", None, None), ("pixels", None, None), ("files", 0, 4), ("files", 2, 8))
    ]
    limit = found[0]["tflops"]
    assert all(line["share"] == pytest.approx(line["tflops"] / limit, rel=1e-3) for line in found[1:])


@pytest.mark.parametrize("name", ["ViT-B/16", "ViT-L/14"])
def test_operations_of_an_image_tower_are_counted(scripts: dict[str, ModuleType], name: str) -> None:
    shape = replace(SHAPES[name], vision_layers=3, text_layers=1, vocab_size=10)
    counter = FlopCounterMode(display=False)  # which does not know the CPU's own kernels of attention
    with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
        CLIP(shape).eval().encode_image(torch.zeros(1, 3, 224, 224))
    assert scripts["encode_time"].flops_per_image(shape) == counter.get_total_flops()


def test_calls_of_a_step_are_counted(scripts: dict[str, ModuleType]) -> None:
    one_case = scripts["step_time"].one_case
    events = [("step", 0, 10), ("cudaLaunchKernel", 1, 2), ("cuLaunchKernelEx", 3, 4), ("cudaGraphLaunch", 4, 5)]
    events += [
        ("cudaMemcpyAsync", 5, 6),
        ("cudaStreamSynchronize", 6, 7),
        ("aten::add", 7, 8),
        ("cudaEventQuery", 8, 9),
    ]
    events += [("cudaLaunchKernel", 11, 12), ("cudaDeviceSynchronize", 12, 13)]
    assert one_case.count_calls(events, "step") == {"launches": 4, "waits": 1}


def test_upstream_must_be_there(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    upstream = scripts["upstream"]
    with pytest.raises(UserError, match="Dassl.pytorch is no checkout of upstream; clone https"):
        upstream.compare(upstream.parser().parse_args([str(tmp_path)]))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_case_runs_at_small_sizes(gpu_cases: ModuleType, tmp_path: Path) -> None:
    more = ["--upstream", UPSTREAM] if UPSTREAM else []
    command = ["bash", str(REPOSITORY / "speed/gpu.sh"), "out", "--small", "--device", "cpu", *more]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    out = tmp_path / "out"
    assert done.returncode == 0, done.stderr
    statuses = {case["case"]: case["status"] for case in lines((out / "cases.jsonl").read_text())}
    assert statuses == {case.name: "ok" for case in gpu_cases.cases(True, "cpu", UPSTREAM)}, (
        out / "log.txt"
    ).read_text()
    for name in ("steps", "encoding", *(["upstream"] if UPSTREAM else [])):
        found = lines((out / f"{name}.jsonl").read_text())
        assert found and [line for line in found if "error" in line] == []
    assert " 0 failed, 0 error" in (out / "summary.md").read_text()
