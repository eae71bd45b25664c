"""Evaluating the model of a run as it stands: on a split, or on images that are in none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data.dataset import DatasetBase, with_names
from oodprompt.engine import checkpoint
from oodprompt.engine.evaluation import Evaluation, evaluate, report_other_predictions
from oodprompt.engine.objective import Objective
from oodprompt.engine.optim import TrainedModels
from oodprompt.engine.selection import Selection
from oodprompt.features.encoder import Encoder
from oodprompt.log import logger, optional, progress
from oodprompt.memory import memory_for
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.reports.curves import write_training_curves
from oodprompt.reports.results import NO_GROUPS, selections_table, write_results


class Testing:
    """Evaluates ``objective`` over ``encoder`` with the evaluator of TEST.EVALUATOR; ``evaluator`` is the last one used."""

    def __init__(
        self,
        cfg: CfgNode,
        trained: TrainedModels,
        encoder: Encoder,
        objective: Objective,
        pseudo: PseudoAttributes,
        selection: Selection,
    ) -> None:
        self.cfg, self.trained, self.encoder, self.objective = cfg, trained, encoder, objective
        self.pseudo, self.selection = pseudo, selection
        self.evaluator = self._new_evaluator()

    def _new_evaluator(self, dataset: DatasetBase | None = None) -> Any:
        make = EVALUATOR_REGISTRY.get(self.cfg.TEST.EVALUATOR, "TEST.EVALUATOR")
        return make(self.cfg, dataset or self.encoder.data.dataset)

    def _by_pseudo_group(self, split: str) -> tuple[Any, Tensor]:
        """An evaluator of pseudo-groups, and the pseudo-attributes of a split."""
        dataset = with_names(self.encoder.data.dataset, self.pseudo.names, self.pseudo.prompts)
        return self._new_evaluator(dataset), self.pseudo.of(self.encoder.split(split))

    @property
    def watches_pseudo_groups(self) -> bool:
        """Whether validation is also by pseudo-groups: where a choice may rest on them, or a debiaser already does."""
        return (self.selection.is_on or "train" in self.pseudo.splits) and len(self.pseudo.prompts) > 1

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, Any]:
        """Metrics of a split; other predictions of the debiasers under ``other_predictions``."""
        self.trained.set_mode(training=False)
        by_pseudo = self._by_pseudo_group(split) if split == "val" and self.watches_pseudo_groups else None
        batches = self.encoder.batches_in_order(split)
        with memory_for(f"while evaluating the {split} split", self._less_memory):
            return evaluate(
                progress.over(batches, f"Evaluation on {split} images", "batch", show=self.encoder.show_progress),
                lambda batch: self.objective.predictions(self.encoder.align(batch)),
                Evaluation(self.evaluator, self._new_evaluator, by_pseudo),
                self.encoder.data_of("train"),
                self.encoder.device,
            )

    def _less_memory(self) -> str:
        """What to do where memory runs out."""
        return (
            f"Lower DATALOADER.TEST.BATCH_SIZE (now {self.cfg.DATALOADER.TEST.BATCH_SIZE}) and rerun the same command"
        )

    @torch.no_grad()
    def classify(self, paths: Sequence[str | Path]) -> Tensor:
        """Probabilities [N, C] of the classes for images that are in no split, by the test transform."""
        self.trained.set_mode(training=False)
        with memory_for("while classifying images", self._less_memory):
            return self.encoder.probabilities(paths, self.objective.predict)

    @torch.no_grad()
    def classify_readable(self, paths: Sequence[str | Path]) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """As ``classify``, batch by batch: places of readable images, their probabilities, and what ails the others."""
        self.trained.set_mode(training=False)
        with memory_for("while classifying images", lambda: f"{self._less_memory()} (predict.py: --batch-size)"):
            yield from self.encoder.probabilities_by_batch(paths, self.objective.predict, skip_unreadable=True)

    def tested_split(self) -> str:
        """TEST.SPLIT, or test where there are no validation data."""
        if self.cfg.TEST.SPLIT == "val" and self.encoder.data.val_loader is None:
            logger.info("There are no validation data: the test split is evaluated")
            return "test"
        return self.cfg.TEST.SPLIT

    def write(
        self, metrics: dict[str, Any], results: dict[str, Any], folder: Path, history: Sequence[dict[str, Any]]
    ) -> None:
        """Write the files of a test and report its metrics; ``results`` is the content of results.json.

        results.json is complete before anything is printed or drawn, and nothing that comes after it ends the run.
        ``history`` has a row per epoch that was trained; its curves are drawn where there is one.
        """
        files = write_results(results, folder)
        if self.cfg.TEST.COMPUTE_CMAT:
            with optional("cmat.pt"):
                checkpoint.save(self.evaluator.confusion_matrix(), folder / "cmat.pt")
                files.append(folder / "cmat.pt")
        if history:
            files += write_training_curves(history, folder)
        with optional("the report"):
            self.evaluator.report(metrics)
            report_other_predictions(metrics)
            if not results["groups"]:
                logger.info(f"Note: {NO_GROUPS}")
            for note in results.get("notes", ()):
                logger.warning(f"Note: {note}")
            if results["selections"]:
                logger.info(selections_table(results["selections"]))
        logger.info("Wrote " + ", ".join(str(file) for file in files))
