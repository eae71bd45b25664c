"""A grid as runs: trainers x bases x data sets x seeds by flags, or methods x settings x seeds by a file."""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from yacs.config import CfgNode

from oodprompt import cli
from oodprompt.config.extensions import register_all
from oodprompt.config.packaged import configs
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.methods.resolve import resolve_methods
from oodprompt.reports.results import finished_results
from oodprompt.runs.grid_file import GridFile

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_LOG = "train.log"


@dataclass(frozen=True)
class TrainingRun:
    """A run of ``train.py``: its output folder and its command line.

    ``setting`` and ``method`` say which cell of the grid it belongs to, as tables name them; ``name`` is it in full.
    """

    folder: Path
    arguments: tuple[str, ...]
    setting: str = ""
    method: str = ""
    seed: int = 0
    name: str = field(default="", compare=False)

    @property
    def command(self) -> list[str]:
        """The command line that trains it."""
        script = REPOSITORY / "train.py"
        start = [str(script)] if script.is_file() else ["-m", "oodprompt", "train"]  # the latter: an installed package
        return [sys.executable, *start, *self.arguments]

    @property
    def log(self) -> Path:
        """The file of what it prints."""
        return self.folder / TRAIN_LOG

    def work(self) -> int:
        """Train and evaluate in this process; the exit status."""
        return cli.main(list(self.arguments))

    def is_finished(self) -> bool:
        """Whether it has whole results."""
        return finished_results(self.folder) is not None

    def outcome(self) -> str:
        """Its accuracies in a few words."""
        results = finished_results(self.folder) or {}
        named = {"accuracy": "accuracy", "worst group": "worst_group_accuracy"}
        parts = [f"{name} {100 * results[key]:.1f} %" for name, key in named.items() if results.get(key) is not None]
        return ", ".join(parts)


def flag_runs(
    trainers: Sequence[str],
    bases: Sequence[str],
    datasets: Sequence[str],
    seeds: Sequence[int],
    config_files: Sequence[str],
    common: Sequence[str],
    keys: Sequence[str],
    out: Path,
) -> list[TrainingRun]:
    """All runs of a grid that flags describe, every one's config checked; ``UserError`` for the first that cannot be.

    Debiasers go over every base, prompt learners stand alone; ``A+B`` is a stack. A data set is a file of configs/datasets
    or a path, "" that of the method's file. ``common`` are words of ``train.py`` of every run, ``keys`` its last ones.
    """
    found: dict[Path, TrainingRun] = {}
    for dataset, trainer in itertools.product(datasets, trainers):
        flags = [*_dataset_flags(dataset), "--config-file", _config_file(config_files, trainer)]
        for base in dict.fromkeys(bases if _is_debiaser(trainer) else [""]):
            main, *stack = trainer.split("+")
            words = ["--trainer", main, *(["--base", base] if base else [])]
            words += ["TRAINER.STACK", repr(tuple(stack))] if stack else []
            line = [*common, *flags, *words, *keys]
            named = dataset_of(line)
            setting, method = Path(dataset).stem or named, "-".join([trainer, *([base] if base else [])])
            for seed in seeds:
                folder = out / setting / method / f"seed{seed}"
                if folder in found:
                    raise UserError(f"--datasets: two files are named {setting}, rename one")
                arguments = ("--seed", str(seed), "--output-dir", str(folder), *line)
                name = _name(method, setting if len(datasets) > 1 else "", seed if len(seeds) > 1 else None)
                found[folder] = TrainingRun(folder, arguments, setting, method, seed, name)
    return list(found.values())


def file_runs(
    grid: GridFile, seeds: Sequence[int], common: Sequence[str], keys: Sequence[str], out: Path
) -> list[TrainingRun]:
    """All runs of a grid file, every one's config checked; ``UserError`` for the first that cannot be.

    They share image features in OUT/features. The first of each setting come first: they render its images.
    """
    found: dict[Path, TrainingRun] = {}
    cache = ["DATALOADER.CACHE_MEMORY_MIB", "0", "DATALOADER.CACHE_DIR", str(out / "features")]
    first: list[TrainingRun] = []
    rest: list[TrainingRun] = []
    for setting, piece in grid.settings.items():
        for method in grid.methods:
            words = [*shlex.split(grid.common), *shlex.split(piece), *shlex.split(method.args)]
            words = [*words, *keys, *(["TEST.SPLIT", "val"] if grid.rank else [])]
            line = ["--config-file", grid.config, *common, *cache, *words]
            try:
                dataset_of(line)
            except UserError as error:
                place = " under ".join([f"methods.{method.name}", *([f"settings.{setting}"] if setting else [])])
                raise UserError(f"{grid.path}: {place}: {error}") from error
            for seed in seeds:
                folder = out / setting / method.folder / f"seed{seed}"
                if folder in found:
                    raise UserError(f"{grid.path}: two methods go to the folder {folder}; give one another name")
                arguments = (*line[:2], "--seed", str(seed), "--output-dir", str(folder), *line[2:])
                label = method.name if method.section in ("", method.name) else f"{method.section}, {method.name}"
                where = setting if len(grid.settings) > 1 else ""
                name = _name(label, where, seed if len(seeds) > 1 else None)
                run = found[folder] = TrainingRun(folder, arguments, setting, method.folder, seed, name)
                (rest if any(run.setting == one.setting for one in first) else first).append(run)
    return first + rest


def dataset_of(line: Sequence[str]) -> str:
    """Build the config of a command line and resolve its methods; returns the data set's name."""
    cfg = config_of([*line, "--seed", "0"])
    resolve_methods(cfg)
    return cfg.DATASET.NAME or "no_dataset"


def _name(method: str, setting: str, seed: int | None) -> str:
    return method + (f" under {setting}" if setting else "") + (f", seed {seed}" if seed is not None else "")


def _is_debiaser(trainer: str) -> bool:
    register_all()
    return "+" in trainer or TRAINER_REGISTRY.get(trainer, "--trainers").debiaser_class is not None


def _config_file(files: Sequence[str], trainer: str) -> str:
    """The method's file of a trainer: its own (``TRAINER=FILE``), else the one that is for all."""
    parts = [file.partition("=") if "=" in file else ("", "=", file) for file in files]
    named = {name: file for name, _, file in parts}
    if len(named) < len(files):
        raise UserError("--config-file: give one file for all trainers, and one as TRAINER=FILE for each that differs")
    for name in (trainer, trainer.split("+")[0], ""):
        if name in named:
            return named[name]
    raise UserError(f"--config-file: none for {trainer}; give FILE for all trainers or {trainer}=FILE")


def _dataset_flags(dataset: str) -> list[str]:
    if not dataset:
        return []
    path = Path(dataset) if dataset.endswith((".yaml", ".yml")) else configs() / f"datasets/{dataset}.yaml"
    return ["--dataset-config-file", str(path)]


def config_of(line: Sequence[str]) -> CfgNode:
    """The config of a command line of ``train.py``, but for its folder."""
    arguments = build_parser().parse_intermixed_args([*line, "--output-dir", os.devnull])
    return setup_cfg(arguments, say=lambda line: None)  # the run itself says it
