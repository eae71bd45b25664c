"""``DATASET.ATTRIBUTE_NAMES auto``: the names of the spurious attribute are those that an audit proposes first."""

from __future__ import annotations

import json
from pathlib import Path

from yacs.config import CfgNode

from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.attributes import PseudoAttributes
from oodprompt.methods.groups import AttributeSources
from oodprompt.shortcuts.finding import find_proposals
from oodprompt.shortcuts.vocabulary import read_vocabulary

FILE = "attribute_names.json"


class ProposedNames:
    """Finds the names in the training images of a run, once; they are kept in the run's folder by a process that ``writes``.

    A run that is resumed or evaluated takes the names that are kept. Nothing is drawn at random, so that the same images
    and the same backbone give the same names elsewhere, too.
    """

    def __init__(self, cfg: CfgNode, encoder: Encoder, writes: bool) -> None:
        self.cfg, self.encoder, self.writes = cfg, encoder, writes

    def find(self) -> tuple[str, ...]:
        """The names, which a line says. ``UserError`` where there are no training images, or no word goes with the label."""
        folder = Path(self.cfg.OUTPUT_DIR)
        for place in (folder, Path(self.cfg.RESUME or folder), folder.parent):  # an evaluation lies in the run's folder
            if (kept := kept_names(place)) is not None:
                logger.info(f"Attribute names: {kept}, of {place / FILE}")
                return kept
        names, why = self._propose()
        logger.info(f"Attribute names: {names}, proposed by an audit of the training images ({why})")
        if self.writes:
            write_atomically(folder / FILE, json.dumps({"names": names, "why": why}, indent=2) + "\n")
        return names

    def _propose(self) -> tuple[tuple[str, ...], str]:
        """The names of the first proposal, and in words how strong it is."""
        images, dataset = self.encoder.data_of("train"), self.encoder.data.dataset
        if not len(images) or dataset.test_only:
            raise UserError(
                "DATASET.ATTRIBUTE_NAMES auto: the data set has no training images to look at; give the names"
            )
        found = find_proposals(
            self.encoder.clip,
            dataset.classnames,
            dataset.template,
            self.encoder.frozen_features_of("train"),
            images.label,
            read_vocabulary(),
            1,
            self.encoder.show_progress,
        )
        if not found.proposals:
            raise UserError(
                f"DATASET.ATTRIBUTE_NAMES auto: none of {found.tested} words goes with the label; give the names"
            )
        first = found.proposals[0]
        strength = "a strong suspect" if first.strong else "no strong suspect"
        return first.names, f"“{found.word(first.best)}”, V {first.best.v:.2f}, {strength}"


def kept_names(folder: Path) -> tuple[str, ...] | None:
    """The names that a run keeps in ``folder``; None without any. ``UserError`` where the file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        names = tuple(json.loads(file.read_text(encoding="utf-8"))["names"])
        if len(names) < 2 or not all(isinstance(name, str) for name in names):
            raise ValueError("it has no two names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it to have names proposed anew") from error
    return names


def check_kept_names(folder: str | Path, pseudo: PseudoAttributes) -> None:
    """``UserError`` where the model in ``folder`` was trained with other proposed names than those in force."""
    kept = kept_names(Path(folder)) if pseudo.are_proposed else None
    if kept is not None and pseudo.is_found and tuple(pseudo.names) != kept:
        raise UserError(
            f"{folder} was trained with the attribute names {kept}, and DATASET.ATTRIBUTE_NAMES auto proposes "
            f'{tuple(pseudo.names)} here; give DATASET.ATTRIBUTE_NAMES "{kept}"'
        )


def proposed_in_results(attributes: AttributeSources) -> dict[str, list[str]]:
    """The entry of results.json on names that were proposed; empty where none were."""
    for seen in (attributes.pseudo, attributes.proposed):
        if seen.are_proposed and seen.is_found:
            return {"proposed_attribute_names": list(seen.names)}
    return {}
