"""What ``speed/gpu.sh`` runs: the cases with their time limits, packages that are missing, and the summary.

``python speed/gpu_cases.py plan`` prints a line per case; ``missing`` the packages; ``summary OUT`` Markdown of the
lines that the cases wrote so far. It needs Python alone, so that it says what is missing on a bare machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 535  # of all limits together, and of the whole script
SMALL_LIMIT = 900  # of every small case
# Modules that cases import, and the packages that hold them. A machine with torch and torchvision lacks a few of them.
PACKAGES = {
    **{"torch": "torch", "torchvision": "torchvision", "numpy": "numpy", "PIL": "pillow", "yaml": "pyyaml"},
    **{"accelerate": "accelerate", "clip": "clip-anytorch", "filelock": "filelock", "ftfy": "ftfy", "regex": "regex"},
    **{"safetensors": "safetensors", "tabulate": "tabulate", "tqdm": "tqdm", "yacs": "yacs"},
    **{"jinja2": "jinja2", "kmedoids": "kmedoids", "matplotlib": "matplotlib", "scipy": "scipy"},
    **{"sklearn": "scikit-learn", "tensorboard": "tensorboard"},
    **{"pytest": "pytest", "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist"},
}
_STEPS = tuple(list(PACKAGES)[:14])  # to build a trainer and to train
_TESTS = tuple(PACKAGES)
UPSTREAM = ("Dassl.pytorch", "CoOp", "multimodal-prompt-learning")  # folders in that of --upstream


@dataclass(frozen=True)
class Case:
    """A command of its own process: ``words`` after ``python``; ``limit`` seconds; ``file`` in OUT for what it prints.

    ``needs`` are modules without which it cannot run.
    """

    name: str
    limit: int
    file: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = _STEPS


def cases(small: bool, device: str, upstream: str = "") -> list[Case]:
    """All cases, what is worth most first. ``small``: small models, few classes, one step, for any machine."""
    first, rest = _steps(small, device)
    found = [Case("doctor", 20, "doctor.txt", ("-m", "oodprompt.doctor")), *_tests(small)]
    found += [*first, *_upstream(small, device, upstream), *_encoding(small, device), *rest]
    if small:  # to show that every case runs, also on a slow machine
        return [replace(case, limit=SMALL_LIMIT) for case in found]
    assert sum(case.limit for case in found) <= TOTAL_SECONDS, "the limits add up to more than the time there is"
    return found


def _tests(small: bool) -> list[Case]:
    """The tests marked ``gpu``. Several processes share a GPU, but for those tests that look at the clock."""
    pytest = ("-m", "pytest", "-vv", "-m", "gpu", "tests/gpu", "--tb=short", "-p", "no:cacheprovider")
    timed = "makes_no_plan"
    if small:
        few = "CoOp and (gradients or without)"
        return [Case("tests", 0, "tests.txt", (*pytest, "-k", few), _TESTS)]
    ends = ("-o", "session_timeout=")  # in seconds; pytest then says what failed so far
    several = (*pytest, ends[0], f"{ends[1]}95", "-n", "6", "-k", f"not {timed}")
    return [
        Case("tests", 110, "tests.txt", several, _TESTS),
        Case("tests by the clock", 25, "tests.txt", (*pytest, ends[0], f"{ends[1]}14", "-k", timed), _TESTS),
    ]


def _steps(small: bool, device: str) -> tuple[list[Case], list[Case]]:
    """Step times and memory by ``step_time.py``: what is worth most, and the rest."""
    always = f"--device {device} --together --count --seconds 0.6"
    always += " --backbone tiny --steps 1 --warm-up 1" if small else " --steps 30"

    def case(name: str, limit: int, trainers: str, classes: Numbers, batch: Numbers, words: str = "") -> Case:
        words = f"--trainer {trainers} --classes {_few(classes, small)} --batch {_few(batch, small)} {words} {always}"
        if device == "cpu":  # where amp is fp32
            words = words.replace("amp", "bf16")
        return Case(name, limit, "steps.jsonl", ("speed/step_time.py", *shlex.split(words)))

    both, large = "--precision amp --compile off graphs", "" if small else "--backbone ViT-L/14"
    anchored = "TRAINER.COOPOOD.ANCHOR attributes"
    first = [
        case("CoOp", 35, "CoOp", (2, 100), (32,), "--precision amp fp32 --compile off graphs"),
        case("CoCoOp", 22, "CoCoOp", (100,), (1,), both),
        case("MaPLe", 28, "MaPLe", (2, 100), (4,), both),
        case("CoOpOOD", 25, "CoOpOOD", (2, 100), (32,), both),
    ]
    rest = [
        case("ViT-L/14", 36, "CoOp MaPLe", (100,), (4,), f"{both} {large}"),
        case("1000 classes", 38, "CoOp KgCoOp CoCoOp MaPLe", (1000,), (4,), "--precision amp --compile graphs"),
        case(
            "debiasers",
            35,
            "CoOpOOD DebiasedPT RaVL KgCoOp",
            (2, 100),
            (32,),
            f"--precision amp --compile graphs {anchored}",
        ),
        case("batches of 32", 30, "CoCoOp MaPLe PromptSRC", (10,), (32,), "--precision amp --compile graphs"),
        case("bf16", 20, "CoOp MaPLe", (10,), (4,), "--precision bf16 --compile graphs --cache off"),
    ]
    return first, rest


Numbers = tuple[int, ...]


def _few(numbers: Numbers, small: bool) -> str:
    """``numbers`` as words, or as many small ones."""
    return " ".join(map(str, (3, 2)[: len(numbers)] if small else numbers))


def _upstream(small: bool, device: str, folder: str) -> list[Case]:
    """Upstream's steps beside ours, where its checkouts are given."""
    if not folder:
        return []
    words = f"--device {device} --seconds 0.6 --precision " + ("fp32" if small or device == "cpu" else "amp fp16 fp32")
    words += " --classes 2 --batch 2 --layers 2 --steps 1 --warm-up 1" if small else " --classes 100 --steps 30"
    words += " --compile graphs"
    return [
        Case(
            f"{name} beside upstream",
            22,
            "upstream.jsonl",
            ("speed/upstream.py", folder, "--trainer", name, *words.split()),
        )
        for name in ("CoOp", "CoCoOp", "MaPLe")
    ]


def _encoding(small: bool, device: str) -> list[Case]:
    """Images per second by ``encode_time.py``."""
    words = f"--device {device}"
    if small:
        words += (
            " --backbone ViT-B/16 --layers 1 --images 4 --batch 2 --repeat 1 --matmul 64 --seconds 0.01 --workers 0 2"
        )
    else:
        words += " --backbone ViT-B/16 ViT-L/14 --seconds 0.6 --workers 0 4 8 16"
    words += " --precision fp32 bf16" if device == "cpu" else " --precision amp bf16 fp32"
    return [Case("image encoding", 45, "encoding.jsonl", ("speed/encode_time.py", *words.split()))]


# --- packages ----------------------------------------------------------------------------------------------------


def missing(modules: Iterable[str] = tuple(PACKAGES)) -> list[str]:
    """The modules that are not installed."""
    return [module for module in modules if importlib.util.find_spec(module) is None]


# --- summary -----------------------------------------------------------------------------------------------------


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The JSON objects in a file of lines, as far as it was written; [] where there is none."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):  # a line that a killed case left half written
            continue
    return found


def table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """A Markdown table of the columns that any of ``rows`` has."""
    columns = [column for column in columns if any(row.get(column) is not None for row in rows)]
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def summary(out: Path) -> str:
    """Markdown of all that the cases wrote to ``out`` so far."""
    lines = {name: read_lines(out / f"{name}.jsonl") for name in ("cases", "steps", "upstream", "encoding")}
    devices = {str(line["device"]) for file in lines.values() for line in file if "device" in line and "torch" in line}
    parts = [f"# A run of speed/gpu.sh\n\nMeasured on: {', '.join(sorted(devices)) or 'nothing yet'}."]
    tests = (out / "tests.txt").read_text(encoding="utf-8", errors="replace") if (out / "tests.txt").is_file() else ""
    if tests:
        parts.append("## Tests\n\n" + tests_of(tests))
    for title, name, columns in (
        ("Steps", "steps", (*_SETTINGS, *_TIMES.values(), "launches", "waits", "peak_mib", "error")),
        (
            "Beside upstream",
            "upstream",
            ("implementation", *_SETTINGS, "step ms", "peak_mib", "ratio", "ratio_fp16", "error"),
        ),
        (
            "Image encoding",
            "encoding",
            ("what", "backbone", "precision", "workers", "images_s", "pass_s", "tflops", "share"),
        ),
        ("Cases", "cases", ("case", "status", "seconds", "limit")),
    ):
        if lines[name]:
            parts.append(f"## {title}\n\n" + table([_in_ms(line) for line in lines[name]], columns))
    return "\n\n".join(parts) + "\n"


_SETTINGS = ("trainer", "base", "backbone", "classes", "batch", "cache", "precision", "compile", "options")
_TIMES = {f"{part}_s": f"{part} ms" for part in ("step", "mean", "host", "image_fwd", "text_fwd", "backward")} | {
    "setup_s": "setup ms"
}


def _in_ms(line: dict[str, Any]) -> dict[str, Any]:
    return line | {name: 1000 * line[key] for key, name in _TIMES.items() if line.get(key) is not None}


def tests_of(text: str) -> str:
    """How many tests had which outcome, and a line of each that failed, out of what pytest printed so far."""
    # With one process a line is NAME OUTCOME [n%], with several [gwK] [n%] OUTCOME NAME; OUTCOME NAME - WHY comes last.
    failed = [line for line in text.splitlines() if re.match(r"(FAILED|ERROR) tests/", line)]
    ran = [line for line in text.splitlines() if "tests/" in line and line not in failed]
    outcomes = [match[1] for line in ran if (match := re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", line))]
    numbers = ", ".join(f"{outcomes.count(kind)} {kind.lower()}" for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED"))
    early = ["Time ran out before all had run."] if "session-timeout" in text else []
    return "\n".join([f"{numbers}.", *early, *(f"- {line}" for line in failed)])


# --- command line ------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser(
        "plan", help="a line per case: name, limit, file, missing packages, command; tabs between"
    )
    plan.add_argument("--small", action="store_true")
    plan.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    plan.add_argument("--upstream", default="")
    commands.add_parser("total", help="seconds of the whole script")
    commands.add_parser("missing", help="the packages that are not installed")
    commands.add_parser("summary", help="Markdown of what was measured so far").add_argument("out", type=Path)
    args = parser.parse_args(argv)
    if args.command == "missing":
        print(" ".join(PACKAGES[module] for module in missing()))
    elif args.command == "total":
        print(TOTAL_SECONDS)
    elif args.command == "summary":
        print(summary(args.out), end="")
    else:
        for case in cases(args.small, args.device, args.upstream):
            lacks = ", ".join(PACKAGES[module] for module in missing(case.needs))
            print("\t".join((case.name, str(case.limit), case.file, lacks or "-", shlex.join(case.words))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
