"""What a run reports beside its metrics: the content of results.json, and how far pseudo-attributes are right."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

import oodprompt
from oodprompt.data.dataset import told_apart
from oodprompt.engine.evaluation import attribute_metrics, attribute_name
from oodprompt.engine.loop import RunState
from oodprompt.engine.proposed_names import proposed_in_results
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.methods.groups import AttributeSources
from oodprompt.methods.quality import GroupQuality, group_quality
from oodprompt.reports.attributes import GROUP_QUALITY, PSEUDO_ATTRIBUTES, quality_line, write_pseudo_attributes
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


@dataclass(frozen=True)
class _Named:
    """The classes of a data set, and names of an attribute that are not its own."""

    num_classes: int
    classnames: Sequence[str]
    attribute_names: Sequence[str]
    attribute_prompts: Sequence[Sequence[str]]


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
        dataset: Any = self.encoder.data.dataset
        own = not self.pseudo.are_proposed
        if not own:  # labels are of the data set's own names
            dataset = _Named(dataset.num_classes, dataset.classnames, self.pseudo.names, self.pseudo.prompts)
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


class GroupReport:
    """How far the groups of a run are those of the attribute labels: reported, and kept for the results.

    ``quality``: by split that groups were asked of, where it has attribute labels. Groups of the labels themselves
    (TRAINER.GROUPS true) are not reported.
    """

    def __init__(self, encoder: Encoder, attributes: AttributeSources, folder: Path, writes: bool) -> None:
        self.encoder, self.attributes, self.folder, self.writes = encoder, attributes, folder, writes
        self.quality: dict[str, dict[str, Any]] = {}
        self._reported: list[str] = []

    def update(self, is_resumed: bool) -> None:
        """Report the splits that were asked for since the last call.

        Where no epoch was left to train (``is_resumed``), what the run found before is read back.
        """
        file, attributes = self.folder / GROUP_QUALITY, self.attributes
        if not attributes.asked:
            if is_resumed and file.is_file():
                self.quality = json.loads(file.read_text(encoding="utf-8"))
            return
        new = [name for name in attributes.asked if name not in self._reported]
        self._reported += new
        for name in new if attributes.choice != "true" else ():
            split = self.encoder.split(name)
            found = group_quality(attributes.values(split), split.label, split.attribute)
            if found is not None:
                self.quality[name] = self._row(found)
                if self.writes:
                    logger.info(quality_line(name, self.quality[name]))
        if new and self.quality and self.writes:
            write_atomically(file, json.dumps(self.quality, indent=2, ensure_ascii=False) + "\n")

    def _row(self, found: GroupQuality) -> dict[str, Any]:
        dataset = self.encoder.data.dataset
        names = told_apart(dataset.classnames)
        return {
            "source": self.attributes.choice,
            "num_samples": found.num_samples,
            "num_groups": found.num_groups,
            "agreement": found.agreement,
            "worst_group_agreement": found.worst_group_agreement,
            "adjusted_mutual_information": found.adjusted_mutual_information,
            "groups": [
                {"class": names[y], "attribute": attribute_name(dataset, a), "num_samples": n, "agreement": agreement}
                for y, a, n, agreement in found.groups
            ],
        }


class AttributeReports:
    """What a run reports on its attributes and groups: how far they are right, and where they come from."""

    def __init__(self, encoder: Encoder, attributes: AttributeSources, folder: Path, writes: bool) -> None:
        self.attributes = attributes
        self.pseudo = PseudoAttributeReport(encoder, attributes.pseudo, folder, writes)
        self.groups = GroupReport(encoder, attributes, folder, writes)

    def update(self, is_resumed: bool) -> None:
        """Report what was asked for since the last call; see the parts."""
        self.pseudo.update(is_resumed)
        self.groups.update(is_resumed)

    def in_results(self, state: RunState) -> dict[str, Any]:
        """The entries of results.json."""
        quality = {"group_quality": self.groups.quality} if self.groups.quality else {}
        return {
            "groups_by": self.attributes.groups_by or state.groups_by,
            "pseudo_attribute_accuracy": self.pseudo.accuracy,
            **quality,
            **proposed_in_results(self.attributes),
        }
