"""Which runs of a grid train in one process, as ``oodprompt.runs.together`` does it, and the job that they are."""

from __future__ import annotations

import functools
import math
import shlex
import sys
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodprompt.errors import UserError
from oodprompt.features.views import views_to_cache
from oodprompt.methods.resolve import resolve_methods
from oodprompt.runs.grid import TrainingRun, config_of

AUTO = 16  # runs in a process, at most
# Their prompts are what costs time in a step, and nothing else of the backbone takes part in it.
LEARNERS = ("CoOp", "KgCoOp", "ProGrad")
_PROMPT_KEYS = ("N_CTX", "CTX_INIT", "CSC", "CLASS_TOKEN_POSITION", "PREC")


@dataclass(frozen=True)
class Bundle:
    """Runs that train in one process; a job."""

    parts: tuple[TrainingRun, ...]

    @property
    def name(self) -> str:
        return f"{len(self.parts)} runs together"

    @property
    def folder(self) -> Path:
        return self.parts[0].folder

    @property
    def log(self) -> Path:
        return self.parts[0].log

    @property
    def command(self) -> list[str]:
        return self.parts[0].command

    @property
    def arguments(self) -> Sequence[str]:
        return self.parts[0].arguments

    def work(self) -> int:
        """Do all of them in this process; the highest exit status."""
        from oodprompt.runs.together import Part, run_together  # here: it takes PyTorch

        parts = [Part(run.log, run.work, f"$ {shlex.join(run.command)}") for run in self.parts]
        return max(run_together(parts))

    def of(self, folders: Collection[Path]) -> Bundle:
        """Those of its runs that are in ``folders``."""
        return Bundle(tuple(run for run in self.parts if run.folder in folders))

    def is_finished(self) -> bool:
        return all(run.is_finished() for run in self.parts)

    def outcome(self) -> str:
        return ""


def size_of(text: str) -> int:
    """The most runs in a process that ``--together`` asks for: 1 for off, 16 for auto. ``UserError`` for what is none."""
    if text in ("auto", "off"):
        return AUTO if text == "auto" else 1
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--together: {text!r} is neither auto nor off nor a number of runs")
    return int(text)


def on_gpu() -> bool:
    """Whether runs would see a GPU, or could not go on in a fork of this process."""
    if sys.platform != "linux":
        return True
    import torch  # here: a command that trains nothing need not wait for it

    return torch.cuda.device_count() > 0


def bundled(todo: Sequence[TrainingRun], size: int, at_once: int) -> list[TrainingRun | Bundle]:
    """The jobs that do all runs, ``size`` in a process at most, so that ``at_once`` processes have work.

    They come in the order of the first run of each.
    """
    groups: dict[Hashable, list[TrainingRun]] = {}
    for run in todo:
        groups.setdefault(_what_is_shared(run) or run, []).append(run)
    jobs: list[TrainingRun | Bundle] = []
    for runs in groups.values():
        number = max(math.ceil(len(runs) / size), min(at_once, len(runs)))
        for i in range(number):
            some = runs[len(runs) * i // number : len(runs) * (i + 1) // number]
            jobs.append(some[0] if len(some) == 1 else Bundle(tuple(some)))
    place = {run: i for i, run in enumerate(todo)}
    return sorted(jobs, key=lambda job: place[job.parts[0] if isinstance(job, Bundle) else job])


def saying(jobs: Sequence[Any]) -> str:
    """In a line, which jobs are of several runs; "" where none is."""
    sizes = [len(job.parts) for job in jobs if isinstance(job, Bundle)]
    if not sizes:
        return ""
    alone = len(jobs) - len(sizes)
    each = f"{min(sizes)} to {max(sizes)}" if min(sizes) < max(sizes) else f"{sizes[0]}"
    rest = f"; {alone} more train alone" if alone else ""
    return f"{sum(sizes)} runs train together in {len(sizes)} process{'es' if sizes[1:] else ''} of {each}{rest} (--together)"


def _what_is_shared(run: TrainingRun) -> Hashable | None:
    """What runs have in common that encode their prompts together; None for a run that cannot."""
    own = {"--seed": 2, "--output-dir": 2}
    words, line = list(run.arguments), []
    while words:
        number = own.get(words[0], 0)
        line += [] if number else words[:1]
        words = words[number or 1 :]
    return _shared_by(tuple(line))


@functools.cache
def _shared_by(line: tuple[str, ...]) -> Hashable | None:
    cfg = config_of([*line, "--seed", "0"])
    base, learner, _ = resolve_methods(cfg)
    keys = cfg.TRAINER.COOP
    if base not in LEARNERS or keys.CLASS_TOKEN_POSITION == "middle" or learner.trains_image_tower:
        return None
    if set(cfg.TRAIN.TRACKERS) - {"tensorboard"}:
        return None  # wandb and mlflow know one run in a process
    try:
        if not views_to_cache(cfg, trains_image_tower=False):
            return None  # the image tower takes nearly all of a step
    except UserError:  # which the run itself says
        return None
    prompts = tuple(str(keys[key]) for key in _PROMPT_KEYS)
    backbone = tuple(str(value) for _, value in sorted(cfg.MODEL.BACKBONE.items()))
    data = (cfg.DATASET.NAME, cfg.DATASET.SUBSAMPLE_CLASSES, tuple(cfg.INPUT.SIZE))
    return (base, backbone, data, prompts, cfg.TRAINER.PREC, cfg.TRAIN.ACTIVATION_GIB, cfg.USE_CUDA)
