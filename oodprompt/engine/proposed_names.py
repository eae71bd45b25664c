"""``DATASET.ATTRIBUTE_NAMES auto``: the names of the spurious attribute are those that an audit proposes first."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from oodprompt.backbones.company import shared
from oodprompt.backbones.weights import digest
from oodprompt.data.dataset import digest as digest_of_data
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.files import write_atomically
from oodprompt.log import logger
from oodprompt.methods.groups import AttributeSources
from oodprompt.shortcuts.finding import find_proposals
from oodprompt.shortcuts.vocabulary import read_vocabulary

FILE = "attribute_names.json"
_REMEDY = "give them in TRAINER.PSEUDO_NAMES, in place of DATASET.ATTRIBUTE_NAMES auto or TRAINER.GROUPS audit"
_MODEL: ContextVar[Path | None] = ContextVar("folder of the model that is loaded", default=None)


@contextlib.contextmanager
def names_of_model(directory: str | Path | None) -> Iterator[None]:
    """A trainer that is built in the block takes the names that the model in ``directory`` was trained with."""
    token = _MODEL.set(Path(directory) if directory else None)
    try:
        yield
    finally:
        _MODEL.reset(token)


class ProposedNames:
    """Finds the names in the training images of a run, once; they are kept in the run's folder by a process that ``writes``.

    The names that a model was trained with are taken wherever the model is loaded (``names_of_model``). A run that goes
    on takes those that it keeps, if its images, classes and backbone are still the same. Nothing is drawn at random, so
    the same images and the same backbone give the same names elsewhere.
    """

    def __init__(self, cfg: CfgNode, encoder: Encoder, writes: bool) -> None:
        self.cfg, self.encoder, self.writes, self._model = cfg, encoder, writes, _MODEL.get()

    def find(self) -> tuple[str, ...]:
        """The names, which a line says. ``UserError`` where there are no training images, or no word goes with the label."""
        if self._model is not None and (kept := _read(self._model)) is not None:
            return _said(kept["names"], self._model)
        facts, folder = self._facts(), Path(self.cfg.OUTPUT_DIR)
        for place in dict.fromkeys((folder, Path(self.cfg.RESUME or folder))):
            if (kept := _read(place)) is None:
                continue
            if kept.get("facts") == facts:
                if place != folder:
                    self._write(folder, kept)
                return _said(kept["names"], place)
            logger.info(
                f"Note: {place / FILE} is of other images, classes or another backbone; names are proposed anew"
            )
        names, why = self._propose()
        logger.info(f"Attribute names: {names}, proposed by an audit of the training images ({why})")
        self._write(folder, {"names": names, "why": why, "facts": facts})
        return names

    def _write(self, folder: Path, content: dict[str, Any]) -> None:
        if self.writes:
            write_atomically(folder / FILE, json.dumps(content, indent=2) + "\n")

    def _facts(self) -> dict[str, str]:
        """Digests of what the names follow from."""
        dataset, tower = self.encoder.data.dataset, self.encoder.clip.visual
        words = "\n".join([dataset.template, *dataset.classnames])
        return {
            "images": digest_of_data(self.cfg.DATASET.ROOT, dataset.train_x),
            "classes": hashlib.sha256(words.encode()).hexdigest()[:16],
            "backbone": shared(("digest", tower), lambda: digest(tower))[:16],
        }

    def _propose(self) -> tuple[tuple[str, ...], str]:
        """The names of the first proposal, and in words how strong it is."""
        images, dataset = self.encoder.data_of("train"), self.encoder.data.dataset
        if not len(images) or dataset.test_only:
            raise UserError(f"an audit proposes no names: the data set has no training images to look at; {_REMEDY}")
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
            raise UserError(f"an audit proposes no names: none of {found.tested} words goes with the label; {_REMEDY}")
        first = found.proposals[0]
        if not first.names:
            raise UserError(
                f"an audit proposes no names: “{found.word(first.best)}” goes with the label, but no other word names the "
                f"images without it; {_REMEDY}"
            )
        strength = "a strong suspect" if first.strong else "no strong suspect"
        return first.names, f"“{found.word(first.best)}”, V {first.best.v:.2f}, {strength}"


def _said(names: Sequence[str], folder: Path) -> tuple[str, ...]:
    logger.info(f"Attribute names: {tuple(names)}, of {folder / FILE}")
    return tuple(names)


def _read(folder: Path) -> dict[str, Any] | None:
    """What a run keeps in ``folder``; None without any. ``UserError`` where the file is damaged."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if len(content["names"]) < 2 or not all(isinstance(name, str) for name in content["names"]):
            raise ValueError("it has no two names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it to have names proposed anew") from error
    return content


def take_names_of(folder: str | Path, attributes: AttributeSources) -> None:
    """Take the names that the model in ``folder`` was trained with; ``UserError`` where others are in force already."""
    pseudo = attributes.proposed if attributes.choice == "audit" else attributes.pseudo
    kept = _read(Path(folder)) if pseudo.are_proposed else None
    if kept is None:
        return
    names = tuple(kept["names"])
    if not pseudo.is_found:
        pseudo.take(_said(names, Path(folder)))
    elif tuple(pseudo.names) != names:
        raise UserError(
            f"{folder} was trained with the attribute names {names}, and an audit proposes {tuple(pseudo.names)} here; "
            f'give TRAINER.PSEUDO_NAMES "{names}" in place of auto, or of TRAINER.GROUPS audit'
        )


def proposed_in_results(attributes: AttributeSources) -> dict[str, list[str]]:
    """The entry of results.json on names that were proposed; empty where none were."""
    for seen in (attributes.pseudo, attributes.proposed):
        if seen.are_proposed and seen.is_found:
            return {"proposed_attribute_names": list(seen.names)}
    return {}
