"""Times training steps: ``python speed/step_time.py --trainer CoOp MaPLe --classes 2 10 100 --batch 4``.

One JSON line per case; speed/README.md explains its columns. A step is the engine's own ``forward_backward`` on a
batch that is already in memory. Weights are random, of the architecture that ``--backbone`` names; nothing is
downloaded and no image is read. Every case has a process of its own, so that one's memory does not count for another.

``--table [FILE ...]`` turns such lines into a Markdown table, ``--growth [FILE ...]`` into what a class costs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import oodprompt.trainers  # noqa: F401 (registers them)
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.weights import SHAPES, check_name
from oodprompt.config.registry import DATASET_REGISTRY, TRAINER_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.data.loading import Batch
from oodprompt.engine import assembly
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from oodprompt.methods.resolve import resolve_methods
from oodprompt.reports.style import markdown_table
from oodprompt.terminal import exit_status

WARM_UP = 2  # steps ahead of the timed ones
MEASURES = ("step_s", "image_fwd_s", "text_fwd_s", "backward_s", "peak_mib")
COLUMNS = (
    *("implementation", "trainer", "base", "backbone", "classes", "batch", "n_ctx", "depth", "cache", "device"),
    *("precision", "threads", "options", *MEASURES, "steps", "torch"),
)
# Prompt learners whose keys are in another's section, and upstream's number of context vectors (in the files of its
# experiments) where it is not the default of the key.
SECTIONS = {"KgCoOp": "COOP", "ProGrad": "COOP"}
UPSTREAM_N_CTX = {"CoCoOp": 4, "KgCoOp": 4, "ProGrad": 4}

_WORDS = """
    red golden northern spotted giant common grey mountain african marbled wild striped hooded desert siberian
    crested dwarf velvet coastal painted river arctic bearded emerald tufted
"""
_NOUNS = """
    water bird, woodpecker, shepherd dog, fire truck, butterfly, utility vehicle, sailing boat, pepper, owl,
    coffee maker, tree frog, salamander, fox, acoustic guitar, mushroom, bicycle, hermit crab, terrier, bridge,
    steam locomotive, orchid, pickup truck, lizard, mailbox, hunting dog, cathedral, beetle, jigsaw puzzle, hawk,
    tennis racket, squirrel, cheeseburger, wolf spider, lighthouse, rabbit, leather sofa, dragonfly,
    suspension bridge, sparrow, wheelbarrow
"""


def class_names(n: int) -> list[str]:
    """The first ``n`` of 1000 distinct names of two or three English words."""
    words, nouns = _WORDS.split(), [" ".join(noun.split()) for noun in _NOUNS.split(",")]
    # Each round through the 40 nouns gives every noun the next of the 25 words; 7 keeps neighbours' words apart.
    return [f"{words[(i // 40 + 7 * (i % 40)) % 25]} {nouns[i % 40]}" for i in range(n)]


# --- one case, in its own process --------------------------------------------------------------------------------


class Clock:
    """Adds up the seconds spent in functions, by the name of a part; on a GPU it waits until the work is done."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.ended: dict[str, float] = {}

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, part: str, function: Callable) -> Callable:
        """``function``, with the time of its calls added to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            began = self.now()
            result = function(*args, **kwargs)
            self.ended[part] = self.now()
            self.seconds[part] += self.ended[part] - began
            return result

        return call


class Peak:
    """The most memory held since ``restart``, in MiB: allocated tensors on a GPU, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def restart(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        # Linux forgets the peak when 5 is written here; elsewhere building the trainer and the warm-up count too.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        # Not ru_maxrss where there is this: a new process inherits that of the one which started it.
        with contextlib.suppress(OSError):
            if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
                return int(match[1]) / 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def random_backbone(name: str, path: str = "", cache_dir: str = "", activation: str = "auto") -> CLIP:
    """A CLIP of the named architecture, in the place of ``load_backbone``."""
    torch.manual_seed(0)
    return CLIP(SHAPES[name]).eval().requires_grad_(False)


def build(case: dict[str, Any], folder: Path) -> PromptTrainer:
    """The trainer of a case, over a data set of which only classes and attributes matter."""
    arguments = [*case["arguments"], "--output-dir", str(folder)]
    cfg = setup_cfg(build_parser().parse_intermixed_args(arguments))
    image, test_image = folder / "image.png", folder / "test_image.png"
    for file in (image, test_image):
        Image.new("RGB", (1, 1)).save(file)
    names = class_names(case["classes"])

    @DATASET_REGISTRY.register()
    class StepTime(DatasetBase):
        attribute_names = ("land", "water")
        attribute_prompts = (("a photo of land.",), ("a photo of water.",))

        def __init__(self, cfg: Any) -> None:
            labels = [i % len(names) for i in range(max(len(names), case["batch"]))]
            data = [Datum(str(image), y, classname=names[y], attribute=i % 2) for i, y in enumerate(labels)]
            super().__init__(cfg, data, test=[Datum(str(test_image), 0, classname=names[0])])

    if cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME not in SHAPES:
        return build_trainer(cfg)
    with mock.patch.object(assembly, "load_backbone", random_backbone):
        return build_trainer(cfg)


def make_batch(trainer: PromptTrainer, size: int) -> Batch:
    """``size`` random images, or image features where the engine's epochs take them from its cache."""
    torch.manual_seed(1)
    data = trainer.dataset.train_x[:size]
    batch: Batch = {key: torch.tensor([getattr(datum, key) for datum in data]) for key in ("label", "attribute")}
    batch["index"] = torch.arange(size)
    if trainer.encoder.views:
        features = torch.randn(size, trainer.clip.shape.embed_dim, device=trainer.device)
        return batch | {"image_features": F.normalize(features, dim=-1)}
    images = torch.randn(size, 3, *trainer.cfg.INPUT.SIZE)
    return batch | {"img": images.pin_memory() if trainer.device.type == "cuda" else images}


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Build the trainer, do the steps, and return medians of their times, the peak, and where and how they ran."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(case, Path(folder))
        if not any(p.requires_grad for p in nn.ModuleList([trainer.learner, *trainer.debiasers]).parameters()):
            raise UserError(f"{trainer.cfg.TRAINER.NAME} trains nothing, so there is no step to time")
        rows, peak = time_steps(trainer, make_batch(trainer, case["batch"]), case["steps"])
    times = (round(median(column), 6) for column in zip(*rows, strict=True))
    return {
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "precision": trainer.precision,
        "threads": torch.get_num_threads(),
        **dict(zip(MEASURES, (*times, round(peak, 1)), strict=True)),
        "torch": torch.__version__,
    }


def time_steps(trainer: PromptTrainer, batch: Batch, steps: int) -> tuple[list[tuple[float, ...]], float]:
    """Seconds of (step, image tower, text tower, backward) of each step after the warm-up, and the peak in MiB."""
    clock, peak = Clock(trainer.device), Peak(trainer.device)
    encoder, objective = trainer.encoder, trainer.objective
    encoder.encode_image = clock.timed("image", encoder.encode_image)
    encoder.encode_frozen = clock.timed("image", encoder.encode_frozen)
    trainer.learner.forward = clock.timed("text", trainer.learner.forward)
    timed = type("Timed", (type(objective),), {"__call__": clock.timed("objective", type(objective).__call__)})
    objective.__class__ = timed  # a call of an object is looked up in its class
    trainer.num_batches = WARM_UP + steps
    for debiaser in trainer.debiasers:
        debiaser.before_train()
    trainer.before_epoch()
    rows = []
    for step in range(trainer.num_batches):
        trainer.batch_idx = step
        if step == WARM_UP:
            peak.restart()
        clock.restart()
        began = clock.now()
        trainer.forward_backward(batch)
        ended = clock.now()
        rows.append((ended - began, clock.seconds["image"], clock.seconds["text"], ended - clock.ended["objective"]))
    return rows[WARM_UP:], peak.mib()


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """``measure``, or ``{"error": ...}`` for what a user can mend and for memory that was refused."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return measure(case)
    except UserError as error:
        return {"error": str(error)}
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return {"error": "out of memory"}
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no exception of its own for memory of the CPU
            raise
        return {"error": "out of memory"}


# --- all cases ---------------------------------------------------------------------------------------------------


def plan(args: argparse.Namespace, opts: Sequence[str]) -> list[dict[str, Any]]:
    """The cases of a command line: columns that are known beforehand, and ``arguments`` for the engine.

    Raises ``UserError`` for names, keys and numbers that no case could run with.
    """
    check_name(args.backbone)
    for flag in ("classes", "batch", "n_ctx", "depth", "steps", "threads"):
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
        "DATALOADER.TRAIN_X.BATCH_SIZE": args.batch,
        "DATALOADER.TEST.BATCH_SIZE": args.batch,  # also that of features which are computed ahead
        "DATALOADER.NUM_WORKERS": 0,
        "DATALOADER.FEATURE_CACHE": args.cache,
        "INPUT.SIZE": size,
        "OPTIM.NAME": "sgd",  # as upstream's
        "OPTIM.LR": 0.002,
        "TRAINER.PREC": args.precision,
        "USE_CUDA": args.device != "cpu",
        "VERBOSE": False,
    }
    cases = []
    for name in names:
        flags = ["--trainer", name, "--base", args.base, "--backbone", args.backbone, "--seed", "1"]
        cfg = config(flags, opts)
        base = resolve_methods(cfg)[0]
        keys = prompt_keys(cfg, base, args.n_ctx, args.depth)
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
            **{key: getattr(args, key) for key in ("batch", "cache", "device", "precision", "steps", "threads")},
            "options": " ".join(opts),
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
    facts = [column for column in COLUMNS if column not in MEASURES]
    values = {column: {str(case.get(column) or "") for case in cases} for column in facts}
    columns = [column for column in facts if column in always or len(values[column]) > 1]
    common = {column: values[column].pop() for column in facts if column not in columns}
    return ", ".join(f"{column} {value}" for column, value in common.items() if value), columns


def table(cases: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the cases, below what they have in common."""
    common, columns = facts_of(cases, always=("trainer", "classes", "batch"))
    columns += [column for column in (*MEASURES, "error") if any(column in case for case in cases)]
    rows = [[cell(case.get(column), column in MEASURES) for column in columns] for case in cases]
    return f"{common}\n\n{markdown_table(columns, rows)}"


def growth(cases: Sequence[dict[str, Any]]) -> str:
    """Least-squares lines a + b C of step time and peak over the number of classes C, one row per kind of case.

    ``misfit`` is the largest difference between a measured step time and its line, as a share of the measured one.
    """
    cases = [case for case in cases if {"classes", "step_s", "peak_mib"} <= case.keys()]
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases:
        groups[str([case.get(c) for c in COLUMNS if c != "classes" and c not in MEASURES])].append(case)
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
    parser.add_argument("--batch", type=int, default=4, metavar="B", help="images per step (default: 4)")
    parser.add_argument("--n-ctx", type=int, metavar="M", help="context vectors (default: as upstream)")
    parser.add_argument("--depth", type=int, metavar="J", help="blocks with prompts (default: the trainer's)")
    parser.add_argument("--cache", choices=("auto", "memory", "off"), default="auto", help="image features")
    parser.add_argument("--backbone", default="ViT-B/16", metavar="NAME", help="default: ViT-B/16")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("fp32", "bf16", "amp"), default="fp32")
    parser.add_argument(
        "--steps", type=int, default=10, metavar="N", help=f"timed, after {WARM_UP} others (default: 10)"
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
        print(json.dumps(answer(args.case)))
        return
    if args.table is not None or args.growth is not None:
        cases = read_lines([*(args.table or ()), *(args.growth or ())])
        print("\n\n".join(f(cases) for f, given in ((table, args.table), (growth, args.growth)) if given is not None))
        return
    for case in plan(args, opts):
        line = case | run_apart([sys.executable, __file__, "--case", json.dumps(case)], args.threads)
        print(json.dumps({key: line[key] for key in (*COLUMNS, "error") if key in line}), flush=True)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: run(sys.argv[1:])))
