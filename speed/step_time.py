"""Times training steps: ``python speed/step_time.py --trainer CoOp MaPLe --classes 2 10 100 --batch 4``.

One JSON line per case; speed/README.md explains its columns. A step is the engine's own ``forward_backward`` on a
batch as the engine's epochs give it. Weights are random, of the architecture that ``--backbone`` names; nothing is
downloaded. Every case has a process of its own, so that one's memory does not count for another.

``--table [FILE ...]`` turns such lines into a Markdown table, ``--growth [FILE ...]`` into what a class costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from oodprompt.backbones import load_backbone
from oodprompt.backbones.weights import SHAPES, check_name
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.methods.resolve import resolve_methods
from oodprompt.reports.style import markdown_table
from oodprompt.terminal import exit_status

sys.path.insert(0, str(Path(__file__).resolve().parent))
import one_case  # noqa: E402
from one_case import COUNTS, MEASURES  # noqa: E402

COLUMNS = (
    *("implementation", "trainer", "base", "backbone", "classes", "batch", "n_ctx", "depth", "cache", "device"),
    *("precision", "compile", "threads", "options", *MEASURES, *COUNTS, "steps", "torch"),
)
# Prompt learners whose keys are in another's section, and upstream's number of context vectors (in the files of its
# experiments) where it is not the default of the key.
SECTIONS = {"KgCoOp": "COOP", "ProGrad": "COOP"}
UPSTREAM_N_CTX = {"CoCoOp": 4, "KgCoOp": 4, "ProGrad": 4}


# --- all cases ---------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, opts: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of a command line: columns that are known beforehand, and ``arguments`` for the engine.

    Raises ``UserError`` for names, keys and numbers that no case could run with.
    """
    check_name(args.backbone)
    for flag in ("classes", "batch", "n_ctx", "depth", "steps", "threads", "warm_up", "layers"):
        value = getattr(args, flag)
        if value is not None and np.min(value) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: give 1 or more")
    if max(args.classes) > 1000:
        raise UserError("--classes: there are names for 1000 classes")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    # What trains, and one debiaser; others add next to nothing to a step, or a whole training ahead of the first.
    learners = [n for n, t in TRAINER_REGISTRY.items() if t.learner_class and not n.startswith("ZeroshotCLIP")]
    learners = sorted([*learners, "CoOpOOD"])
    names = learners if args.trainer == ["all"] else args.trainer
    shape = SHAPES[args.backbone] if args.backbone in SHAPES else load_backbone(args.backbone).shape
    size = (shape.image_resolution, shape.image_resolution)
    common = {
        "DATASET.NAME": "StepTime",
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.FEATURE_CACHE": args.cache,
        "INPUT.SIZE": size,
        "INPUT.TRANSFORMS": "['normalize']",
        "OPTIM.NAME": "sgd",  # as upstream's
        "OPTIM.LR": 0.002,
        "USE_CUDA": args.device != "cpu",
        "VERBOSE": False,
    }
    cases = []
    for name, batch, precision, how in itertools.product(names, args.batch, args.precision, args.compile or [None]):
        flags = ["--trainer", name, "--base", args.base, "--backbone", args.backbone, "--seed", "1"]
        cfg = config(flags, opts)
        base = resolve_methods(cfg)[0]
        keys = prompt_keys(cfg, base, args.n_ctx, args.depth) | compile_key(cfg, how)
        keys |= {f"DATALOADER.{split}.BATCH_SIZE": batch for split in ("TRAIN_X", "TEST")} | {"TRAINER.PREC": precision}
        arguments = [*flags, *(str(word) for pair in (common | keys).items() for word in pair), *opts]
        cfg = config(flags, arguments[len(flags) :])
        section = getattr(cfg.TRAINER, section_of(base), {})
        facts = {
            "implementation": "oodprompt",
            "trainer": name,
            "base": base if TRAINER_REGISTRY.get(name).debiaser_class else None,
            "backbone": cfg.MODEL.BACKBONE.NAME,
            "n_ctx": next((value for key, value in section.items() if key.startswith("N_CTX")), None),
            "depth": next((value for key, value in section.items() if key.startswith("PROMPT_DEPTH")), None),
            **{key: getattr(args, key) for key in ("cache", "device", "steps", "threads")},
            **{key: getattr(args, key) for key in ("seconds", "warm_up", "count", "layers")},
            **{"batch": batch, "precision": precision, "compile": how, "options": " ".join(opts)},
        }
        cases += [facts | {"classes": classes, "arguments": arguments} for classes in args.classes]
    return cases


def config(flags: Sequence[str], opts: Sequence[str]) -> Any:
    """The engine's configuration for ``flags`` and KEY VALUE pairs."""
    return setup_cfg(build_parser().parse_intermixed_args([*flags, "--output-dir", "unused", *opts]))


def section_of(learner: str) -> str:
    """The section of TRAINER that holds a prompt learner's keys."""
    return SECTIONS.get(learner, learner.upper())


def prompt_keys(cfg: Any, learner: str, n_ctx: int | None, depth: int | None) -> dict[str, Any]:
    """The keys that give a prompt learner ``n_ctx`` random context vectors in ``depth`` blocks, as far as it has any."""
    section = section_of(learner)
    wanted = {"N_CTX": UPSTREAM_N_CTX.get(learner) if n_ctx is None else n_ctx, "PROMPT_DEPTH": depth}
    keys: dict[str, Any] = {}
    for key in getattr(cfg.TRAINER, section, {}):
        value = next((value for start, value in wanted.items() if key.startswith(start)), None)
        if key == "CTX_INIT":
            keys[f"TRAINER.{section}.{key}"] = ""  # words would take the place of the number
        elif value is not None:
            keys[f"TRAINER.{section}.{key}"] = value
    return keys


def compile_key(cfg: Any, how: str | None) -> dict[str, str]:
    """The key that says how steps are compiled. ``UserError`` where this version has none."""
    if how is None:
        return {}
    if "COMPILE" not in cfg.TRAIN:
        raise UserError("--compile: this version of OODPrompt has no key TRAIN.COMPILE")
    return {"TRAIN.COMPILE": how}


def run_apart(command: Sequence[str], threads: int | None = None) -> dict[str, Any]:
    """The JSON object that a command prints as its last line; ``{"error": ...}`` when it fails or is killed."""
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    if threads is not None:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if done.returncode < 0:
        cause = ", most likely for want of memory" if -done.returncode == signal.SIGKILL else ""
        return {"error": f"killed by {signal.Signals(-done.returncode).name}{cause}"}
    sys.stderr.write(done.stderr)
    return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


# --- tables ------------------------------------------------------------------------------------------------------


def read_lines(files: Sequence[str]) -> list[dict[str, Any]]:
    """The cases in JSON lines of ``files``, or of the standard input when there are none."""
    try:
        texts = {file: Path(file).read_text(encoding="utf-8") for file in files} or {"stdin": sys.stdin.read()}
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    cases = []
    for file, text in texts.items():
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    cases.append(dict(json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{file}, line {number} is no JSON object: {error}") from error
    if not cases:
        raise UserError(f"{', '.join(texts)}: there are no cases")
    return cases


def facts_of(cases: Sequence[dict[str, Any]], always: Sequence[str]) -> tuple[str, list[str]]:
    """What all cases have in common, as a sentence, and the columns in which they differ (or that are ``always``)."""
    facts = [column for column in COLUMNS if column not in (*MEASURES, *COUNTS)]
    values = {column: {str(case.get(column) or "") for case in cases} for column in facts}
    columns = [column for column in facts if column in always or len(values[column]) > 1]
    common = {column: values[column].pop() for column in facts if column not in columns}
    return ", ".join(f"{column} {value}" for column, value in common.items() if value), columns


def table(cases: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the cases, below what they have in common."""
    common, columns = facts_of(cases, always=("trainer", "classes", "batch"))
    shown = (*MEASURES, *COUNTS, "error")
    columns += [column for column in shown if any(case.get(column) is not None for case in cases)]
    rows = [[cell(case.get(column), column in MEASURES) for column in columns] for case in cases]
    return f"{common}\n\n{markdown_table(columns, rows)}"


def growth(cases: Sequence[dict[str, Any]]) -> str:
    """Least-squares lines a + b C of step time and peak over the number of classes C, one row per kind of case.

    ``misfit`` is the largest difference between a measured step time and its line, as a share of the measured one.
    """
    cases = [case for case in cases if {"classes", "step_s", "peak_mib"} <= case.keys()]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        same = [c for c in COLUMNS if c not in ("classes", "steps", *MEASURES, *COUNTS)]
        groups[str([case.get(c) for c in same])].append(case)
    groups = {key: group for key, group in groups.items() if len({case["classes"] for case in group}) > 1}
    if not groups:
        raise UserError("--growth: no trainer was timed at two or more numbers of classes")
    common, columns = facts_of([case for group in groups.values() for case in group], always=("trainer", "classes"))
    header = [*columns, "step_s", "step_s per class", "misfit", "peak_mib", "peak_mib per class"]
    rows = []
    for group in groups.values():
        classes = np.array([case["classes"] for case in group])
        lines, steps = [], np.array([case["step_s"] for case in group])
        for values in (steps, np.array([case["peak_mib"] for case in group])):
            slope, start = np.polyfit(classes, values, 1).round(9).tolist()
            lines.append((start, slope))
        misfit = np.abs(steps - lines[0][0] - lines[0][1] * classes) / steps
        facts = group[0] | {"classes": " ".join(map(str, sorted(classes)))}
        rows.append(
            [cell(facts.get(c)) for c in columns]
            + [cell(value, True) for value in lines[0]]
            + [f"{100 * misfit.max():.0f} %"]
            + [cell(value, True) for value in lines[1]]
        )
    return f"{common}\n\n{markdown_table(header, rows)}"


def cell(value: Any, measured: bool = False) -> str:
    """A value for a table: numbers that were measured have three digits, what is missing is empty."""
    if value is None:
        return ""
    if not measured:
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


# --- command line ------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="KEY VALUE pairs may follow, as for train.py, e.g. TRAINER.COOP.CSC True",
    )
    parser.add_argument("--trainer", nargs="+", default=["CoOp"], metavar="NAME", help="names, or all (default: CoOp)")
    parser.add_argument("--base", default="CoOp", help="prompt learner under a debiaser (default: CoOp)")
    parser.add_argument("--classes", nargs="+", type=int, default=[2, 10, 100], metavar="C", help="default: 2 10 100")
    parser.add_argument("--batch", nargs="+", type=int, default=[4], metavar="B", help="images per step (default: 4)")
    parser.add_argument("--n-ctx", type=int, metavar="M", help="context vectors (default: as upstream)")
    parser.add_argument("--depth", type=int, metavar="J", help="blocks with prompts (default: the trainer's)")
    parser.add_argument("--cache", choices=("auto", "memory", "off"), default="auto", help="image features")
    parser.add_argument("--backbone", default="ViT-B/16", metavar="NAME", help="default: ViT-B/16")
    parser.add_argument("--layers", type=int, metavar="L", help="blocks of each tower (default: the architecture's)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "amp"), default=["fp32"], metavar="P")
    parser.add_argument("--compile", nargs="+", metavar="C", help="values of TRAIN.COMPILE: off, auto, graphs")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps, at most (default: 10)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="fewer steps, of which at least 3, in about S seconds"
    )
    parser.add_argument("--warm-up", type=int, metavar="N", help="steps ahead of the timed ones (default: 2, GPU: 10)")
    parser.add_argument("--count", action="store_true", help="also count launches and waits of a step, on a GPU")
    parser.add_argument(
        "--together", action="store_true", help="all cases in one process: on a GPU memory is told apart"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: torch's)")
    parser.add_argument("--table", nargs="*", metavar="FILE", help="print a table of JSON lines (default: stdin)")
    parser.add_argument("--growth", nargs="*", metavar="FILE", help="fit JSON lines over classes (default: stdin)")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # of a child process
    return parser


def split_off_keys(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags and KEY VALUE pairs apart; argparse would take the pairs for more trainers or classes."""
    flags, opts, i = [], [], 0
    while i < len(words):
        is_key = re.fullmatch(r"[A-Z]\w*(\.[A-Z]\w*)+", words[i]) and words[i].isupper()
        target, count = (opts, 2) if is_key else (flags, 1)
        target += words[i : i + count]
        i += count
    return flags, opts


def run(argv: Sequence[str]) -> None:
    """Time the cases, or print a table of lines; raises ``UserError`` for what the user can mend."""
    flags, opts = split_off_keys(argv)
    args = parser().parse_args(flags)
    if args.case:
        print(json.dumps(one_case.answer(args.case)))
        return
    if args.table is not None or args.growth is not None:
        cases = read_lines([*(args.table or ()), *(args.growth or ())])
        print("\n\n".join(f(cases) for f, given in ((table, args.table), (growth, args.growth)) if given is not None))
        return
    for case in plan(args, opts):
        apart = [sys.executable, __file__, "--case", json.dumps(case)]
        line = case | (one_case.answer_and_clear(case) if args.together else run_apart(apart, args.threads))
        print(json.dumps({key: line[key] for key in (*COLUMNS, "error") if key in line}), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
