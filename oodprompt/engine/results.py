"""What a run reports beside its metrics: the content of results.json, and how far pseudo-attributes are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import oodprompt
from oodprompt.data.dataset import with_names
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
    peak_memory: dict[str, float],
    environment: dict[str, Any],
    **further: Any,
) -> dict[str, Any]:
    """The content of results.json; ``further`` entries are the selection, groups, pseudo-attributes and checkpoint.

    ``peak_memory`` and ``environment`` are those of ``oodprompt.engine.device``.
    """
    checkpoint = further.pop("checkpoint")
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
        **peak_memory,
        "environment": {"torch": torch.__version__, "oodprompt": oodprompt.__version__, **environment},
        "checkpoint": checkpoint,
    }


def refuse_new_start(cfg: CfgNode, base_name: str, folder: Path) -> None:
    """``UserError`` where a run starts anew that was to be resumed, or in a folder with results of another run.

    The results of another method or data set would be lost.
    """
    if cfg.RESUME:
        raise UserError(f"--resume: there is no checkpoint in {cfg.RESUME}")
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
        own = self.pseudo.of_labels
        dataset = with_names(self.encoder.data.dataset, self.pseudo.names, self.pseudo.prompts)
        rows = {
            name: attribute_metrics(
                self.pseudo.of(split),
                split.label,
                split.attribute if own else torch.full_like(split.attribute, -1),
                dataset,
            )
            for name, split in ((name, self.encoder.split(name)) for name in self.pseudo.splits)
        }
        if rows and self.writes:
            new = [name for name in rows if name not in self.accuracy]
            for line in write_pseudo_attributes(rows, new, dataset, self.pseudo.noise, self.folder):
                logger.info(line)
        self.accuracy = {name: row["accuracy"] for name, row in rows.items()}
