"""Which epoch is tested: the last one, or the best on validation data by one of three criteria."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from yacs.config import CfgNode

from oodprompt.engine.checkpoints import Checkpoints
from oodprompt.engine.evaluation import CRITERIA
from oodprompt.engine.loop import RunState
from oodprompt.errors import UserError
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.methods.splits import Split


class Selection:
    """TEST.FINAL_MODEL and TEST.SELECTION; the best values so far are in ``state``."""

    def __init__(self, cfg: CfgNode, state: RunState) -> None:
        self.cfg, self.choice, self.state = cfg, cfg.TEST.SELECTION, state
        self.is_on = cfg.TEST.FINAL_MODEL == "best_val"  # whether the epoch is chosen on validation data

    def check(self, val: Split, pseudo: PseudoAttributes) -> None:
        """``UserError`` for a choice that the validation data cannot give."""
        if not self.is_on or self.choice in ("auto", "accuracy"):
            return
        if self.choice == "worst_group_accuracy" and bool((val.attribute < 0).all()):
            raise UserError(
                f"TEST.SELECTION {self.choice}: no validation image has an attribute label; use accuracy, "
                "or worst_pseudo_group_accuracy, which needs names of the attribute's values only"
            )
        if self.choice == "worst_pseudo_group_accuracy":
            _ = pseudo.text  # raises where the data set names no values

    def validates_after(self, epoch: int, has_validation: bool) -> bool:
        """Whether validation data are evaluated after ``epoch`` epochs: for the choice, or by TRAIN.VAL_FREQ."""
        every = self.cfg.TRAIN.VAL_FREQ
        due = every > 0 and (epoch % every == 0 or epoch == self.state.max_epoch)
        return self.is_on or (due and has_validation)

    def improved(self, metrics: dict[str, Any], epoch: int) -> list[str]:
        """The criteria by which ``epoch`` is the best so far, of those that the validation data allow."""
        improved = []
        for criterion in CRITERIA:
            value = metrics[criterion]
            if value is not None and value > self.state.best.get(criterion, {"value": -math.inf})["value"]:
                self.state.best[criterion] = {"value": value, "epoch": epoch}
                improved.append(criterion)
        return improved

    @property
    def criterion(self) -> str:
        """What best_val maximises; ``auto`` is told by what there is a best value of."""
        if self.choice != "auto":
            return self.choice
        return "worst_group_accuracy" if "worst_group_accuracy" in self.state.best else "accuracy"

    @property
    def best_epoch(self) -> int:
        """The epoch that counts; 0 before any was evaluated."""
        return self.state.best[self.criterion]["epoch"] if self.state.best else 0

    def compare(self, checkpoints: Checkpoints, evaluate: Callable[[], dict[str, Any]]) -> list[dict[str, Any]]:
        """What each criterion would have chosen, and the last epoch: a row each, with the accuracies of that epoch.

        ``evaluate()`` gives the metrics of the loaded model on the tested split. The models of the last row stay loaded.
        """
        chosen = [(criterion, int(best["epoch"]), best["value"]) for criterion, best in self.state.best.items()]
        metrics: dict[int, dict[str, Any]] = {}
        rows = []
        for criterion, epoch, value in [*chosen, ("last epoch", self.state.max_epoch, None)]:
            if epoch not in metrics:
                checkpoints.load_slot(epoch if value is None else self.slot(criterion))
                metrics[epoch] = evaluate()
            row = {key: metrics[epoch][key] for key in ("accuracy", "worst_group_accuracy", "gap")}
            rows.append({"criterion": criterion, "epoch": epoch, "validation": value, **row})
        return rows

    def slot(self, criterion: str) -> str | None:
        """Which checkpoint holds the best model by ``criterion``: the best one (None) for the one that counts."""
        return None if criterion == self.criterion else criterion
