"""What a run reports beside its metrics: the content of results.json, and how far pseudo-attributes are right."""

from __future__ import annotations

import json
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import oodprompt
from oodprompt.engine.evaluation import attribute_metrics
from oodprompt.engine.loop import RunState
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.log import logger
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.reports.attributes import PSEUDO_ATTRIBUTES, write_pseudo_attributes
from oodprompt.reports.results import finished_results

_METRICS = ("num_samples", "accuracy", "macro_f1", "worst_group_accuracy", "adjusted_average_accuracy", "gap")


def results_of(
    cfg: CfgNode,
    base_name: str,
    metrics: dict[str, Any],
    split: str,
    state: RunState,
    test_seconds: float,
    device: torch.device,
    **further: Any,
) -> dict[str, Any]:
    """The content of results.json; ``further`` entries are the selection, groups, pseudo-attributes and checkpoint."""
    checkpoint = further.pop("checkpoint")
    cuda = device.type == "cuda"
    return {
        "trainer": cfg.TRAINER.NAME,
        "base": base_name,
        "stack": list(cfg.TRAINER.STACK),
        "dataset": cfg.DATASET.NAME,
        "backbone": cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
        "seed": cfg.SEED,
        "split": split,
        **{key: metrics[key] for key in _METRICS},
        "num_without_attribute": metrics.get("num_without_attribute", 0),  # an evaluator of the user's may not count
        "groups": metrics["groups"],
        "classes": metrics["classes"],
        "other_predictions": metrics["other_predictions"],
        **further,
        "time": {
            "train_s": state.train_seconds,
            "step_ms_median": state.step_ms_median,
            "test_s": test_seconds,
        },
        "peak_memory_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else _peak_memory_mib(),
        "environment": {
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else f"cpu ({platform.machine()})",
            "oodprompt": oodprompt.__version__,
        },
        "checkpoint": checkpoint,
    }


def _peak_memory_mib() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def refuse_other_results(cfg: CfgNode, base_name: str, folder: Path) -> None:
    """``UserError`` where ``folder`` has the results of another method or data set, which would be lost."""
    old = finished_results(folder) or {}
    now = {"trainer": cfg.TRAINER.NAME, "base": base_name, "stack": list(cfg.TRAINER.STACK)}
    now["dataset"] = cfg.DATASET.NAME
    changed = [f"{key} {old[key]!r}, not {new!r}" for key, new in now.items() if key in old and old[key] != new]
    if changed:
        raise UserError(
            f"{folder} has the results of another run ({'; '.join(changed)}): choose another --output-dir, "
            "or delete the folder"
        )


class PseudoAttributeReport:
    """How far pseudo-attributes are right, where the data set knows: reported, drawn and kept for the results.

    ``accuracy``: by split, None where there are no attribute labels.
    """

    def __init__(self, encoder: Encoder, pseudo: PseudoAttributes, folder: Path, writes: bool) -> None:
        self.encoder, self.pseudo, self.folder, self.writes = encoder, pseudo, folder, writes
        self.accuracy: dict[str, float | None] = {}

    def update(self, is_resumed: bool) -> None:
        """Report the splits that were asked for since the last call.

        Where no epoch was left to train (``is_resumed``), what the run found before is read back.
        """
        file = self.folder / PSEUDO_ATTRIBUTES
        if not self.pseudo.splits:
            if is_resumed and file.is_file():
                splits = json.loads(file.read_text(encoding="utf-8"))["splits"]
                self.accuracy = {name: row["accuracy"] for name, row in splits.items()}
            return
        if set(self.pseudo.splits) == set(self.accuracy):
            return
        dataset = self.encoder.data.dataset
        rows = {
            name: attribute_metrics(self.pseudo.of(split), split.label, split.attribute, dataset)
            for name, split in ((name, self.encoder.split(name)) for name in self.pseudo.splits)
        }
        if rows and self.writes:
            new = [name for name in rows if name not in self.accuracy]
            for line in write_pseudo_attributes(rows, new, dataset, self.pseudo.noise, self.folder):
                logger.info(line)
        self.accuracy = {name: row["accuracy"] for name, row in rows.items()}
