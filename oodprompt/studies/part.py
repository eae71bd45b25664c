"""A part of the controlled evaluation, in a process of its own: ``python -m oodprompt.studies.part JSON``."""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sklearn.exceptions import ConvergenceWarning

from oodprompt.files import write_atomically
from oodprompt.log import show_messages
from oodprompt.studies.evaluation import Plan, command, compare_discovery, measure, setting_of, trained
from oodprompt.terminal import exit_status

MEASURED = "measured.json"


@dataclass(frozen=True)
class Part:
    """One model of the grid: trained under a ``setting`` with a ``seed``, and measured.

    The ``standard`` one is searched for what it relies on; the others are mitigations, with what discovery ``found`` in the
    standard model of the same seed.
    """

    plan: Plan
    setting: Path
    method: str
    seed: int
    folder: Path
    name: str
    found: Path | None = None

    @property
    def arguments(self) -> list[str]:
        """The command line of ``train.py`` that trains it."""
        return command(self.plan, self.setting, self.method, self.seed, self.found, self.folder)

    @property
    def command(self) -> list[str]:
        """The command line that trains and measures it."""
        return [sys.executable, "-m", "oodprompt.studies.part", json.dumps(dataclasses.asdict(self), default=str)]

    @property
    def log(self) -> Path:
        """The file of what it prints."""
        return self.folder / "train.log"

    def work(self) -> int:
        """Train what is not trained, and measure it; the exit status."""
        show_messages()
        return exit_status(self._measure)

    def _measure(self) -> None:
        warnings.simplefilter("ignore", ConvergenceWarning)  # baselines cluster regions that are all alike
        trainer, setting = trained(self.arguments, self.folder), setting_of(self.setting)
        measured = measure(trainer, setting["classes"].index(setting["target"]))
        if self.method == "standard":
            measured |= compare_discovery(trainer, setting["feature"], self.folder)
        write_atomically(self.folder / MEASURED, json.dumps(measured, indent=2) + "\n")

    def measured(self) -> dict[str, Any] | None:
        """What was measured; None where nothing whole is there."""
        try:
            content = json.loads((self.folder / MEASURED).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if isinstance(content, dict) else None

    def is_finished(self) -> bool:
        """Whether it was trained and measured."""
        return self.measured() is not None

    def outcome(self) -> str:
        """Worst-group accuracy on images, and what discovery found."""
        measured = self.measured() or {}
        precision = measured.get("precision", {}).get("RaVL")
        parts = [f"worst group {100 * measured['image_worst_group']:.1f} %"] if measured else []
        return ", ".join([*parts, *([] if precision is None else [f"Precision@10 of discovery {precision:.2f}"])])


def part_of(text: str) -> Part:
    """The part that a command line names."""
    content = json.loads(text)
    plan = content["plan"]
    content["plan"] = Plan(plan["kind"], plan["config"], tuple(plan["backbone"]), tuple(plan["keys"]))
    for key in ("setting", "folder", "found"):
        content[key] = None if content[key] is None else Path(content[key])
    return Part(**content)


if __name__ == "__main__":
    sys.exit(part_of(sys.argv[1]).work())
