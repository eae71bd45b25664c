"""What ``speed/gpu.sh`` runs: the cases with their time limits, packages that are missing, and the summary.

``python speed/gpu_cases.py plan`` prints a line per case; ``missing`` the packages; ``summary OUT`` Markdown of the
lines that the cases wrote so far. It needs Python alone, so that it says what is missing on a bare machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOTAL_SECONDS = 535  # of all limits together
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
    """All cases, what is worth most first. ``small``: tiny models, few classes, one step, for any machine."""
    found = [
        Case("doctor", 25, "doctor.txt", ("-m", "oodprompt.doctor"), _STEPS),
        *_steps(small, device, first=True),
        *_steps(small, device, first=False),
    ]
    assert sum(case.limit for case in found) <= TOTAL_SECONDS, "the limits add up to more than the time there is"
    return found


def _steps(small: bool, device: str, first: bool) -> list[Case]:
    """Step times and memory by ``step_time.py``."""
    common = f"--device {device} --together --count --seconds 0.7"
    common += " --backbone tiny --steps 1 --warm-up 1" if small else " --steps 30"

    def case(name: str, limit: int, words: str) -> Case:
        return Case(name, limit, "steps.jsonl", ("speed/step_time.py", *shlex.split(f"{words} {common}")))

    def classes(*numbers: int) -> str:
        return "--classes " + " ".join(str(n) for n in ((2, 3)[: len(numbers)] if small else numbers))

    def batch(*sizes: int) -> str:
        return "--batch " + " ".join(str(n) for n in ((2, 3)[: len(sizes)] if small else sizes))

    if first:
        return [
            case("CoOp", 45, f"--trainer CoOp {classes(2, 100)} {batch(32)} --precision amp fp32 bf16"),
            case("CoCoOp", 25, f"--trainer CoCoOp {classes(100)} {batch(1)} --precision amp fp32"),
            case("MaPLe", 30, f"--trainer MaPLe {classes(2, 100)} {batch(4)} --precision amp fp32"),
            case("CoOpOOD", 30, f"--trainer CoOpOOD {classes(2, 100)} {batch(32)} --precision amp fp32"),
        ]
    anchored = "TRAINER.COOPOOD.ANCHOR attributes"
    return [
        case(
            "others",
            45,
            f"--trainer CoOpOOD DebiasedPT RaVL KgCoOp {classes(2, 100)} {batch(32)} --precision amp {anchored}",
        ),
        case("large batches", 35, f"--trainer CoCoOp MaPLe PromptSRC {classes(10)} {batch(32)} --precision amp"),
        case("1000 classes", 40, f"--trainer CoOp KgCoOp CoCoOp MaPLe {classes(1000)} {batch(4)} --precision amp"),
    ]


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
    runs, steps = read_lines(out / "cases.jsonl"), read_lines(out / "steps.jsonl")
    devices = sorted({str(line["device"]) for line in steps if "device" in line})
    parts = [f"# A run of speed/gpu.sh\n\nDevice: {', '.join(devices) or 'none measured yet'}."]
    if steps:
        rows = [
            {**line, **{f"{key[:-2]} ms": 1000 * line[key] for key in _TIMES if line.get(key) is not None}}
            for line in steps
        ]
        columns = ("trainer", "backbone", "classes", "batch", "cache", "precision", "compile", "options")
        times = [f"{key[:-2]} ms" for key in _TIMES]
        parts.append("## Steps\n\n" + table(rows, (*columns, *times, "launches", "waits", "peak_mib", "error")))
    if runs:
        parts.append("## Cases\n\n" + table(runs, ("case", "status", "seconds", "limit")))
    return "\n\n".join(parts) + "\n"


_TIMES = ("step_s", "mean_s", "host_s", "image_fwd_s", "text_fwd_s", "backward_s")


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
    commands.add_parser("missing", help="the packages that are not installed")
    commands.add_parser("summary", help="Markdown of what was measured so far").add_argument("out", type=Path)
    args = parser.parse_args(argv)
    if args.command == "missing":
        print(" ".join(PACKAGES[module] for module in missing()))
    elif args.command == "summary":
        print(summary(args.out), end="")
    else:
        for case in cases(args.small, args.device, args.upstream):
            lacks = ", ".join(PACKAGES[module] for module in missing(case.needs))
            print("\t".join((case.name, str(case.limit), case.file, lacks or "-", shlex.join(case.words))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
