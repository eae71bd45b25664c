"""One audit: what is computed, and the content of ``audit.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oodprompt.auditing.readable import ReadableImages
from oodprompt.data.columns import Images
from oodprompt.data.dataset import told_apart
from oodprompt.engine.evaluation import group_metrics
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError, nearest
from oodprompt.features.encoder import evaluating
from oodprompt.reports.json_values import json_value
from oodprompt.shortcuts.association import LEVEL, STRONG, Association, Flags, Numbers
from oodprompt.shortcuts.effects import Cell, Effect, effect_of
from oodprompt.shortcuts.finding import find_proposals
from oodprompt.shortcuts.keywords import keywords
from oodprompt.shortcuts.proposals import Proposal, Proposals
from oodprompt.shortcuts.vocabulary import read_vocabulary
from oodprompt.shortcuts.words import Words

FORMAT, VERSION = "oodprompt audit", 1
SPLITS = ("train", "val", "test")
_EXAMPLES = 6
_UNREADABLE = 100  # named in the content


@dataclass(frozen=True)
class Options:
    """What an audit looks for: ``vocabulary`` as for ``read_vocabulary``, whether ``sensitive`` words are among it.

    ``split`` is where accuracies are measured ("": val, or test without one), ``regions`` whether discovery runs, too, and
    ``most`` how many proposals are shown. ``UserError`` for a split that there is not.
    """

    vocabulary: str = ""
    sensitive: bool = False
    split: str = ""
    regions: bool = False
    most: int = 12

    def __post_init__(self) -> None:
        if self.split not in ("", *SPLITS):
            raise UserError(f"--split: unknown split {self.split!r}: {nearest(self.split, SPLITS)}")


@dataclass
class Looked:
    """What an audit found, in the ``content`` of audit.json, and what pages and regions are made of."""

    content: dict[str, Any]
    images: Images
    words: Words
    readable: ReadableImages


@dataclass(frozen=True)
class _Evaluated:
    """Images of the ``split`` that a model was evaluated on: ``label``, ``predicted`` [n] and frozen ``features`` [n, d]."""

    split: str
    images: Images
    label: np.ndarray
    predicted: np.ndarray
    features: torch.Tensor
    names: list[str]

    @property
    def right(self) -> Flags:
        return self.label == self.predicted


@torch.no_grad()
def look_for_shortcuts(trainer: PromptTrainer, options: Options) -> Looked:
    """Audit the model of ``trainer`` and the images that it would be trained on.

    Words are looked for in the training images (in those of the split where there are none), accuracies measured on
    ``options.split``. ``UserError`` where the split has no images, or images of one class only.
    """
    readable, dataset = ReadableImages(trainer), trainer.dataset
    split = options.split or ("val" if len(dataset.val) else "test")
    if not len(readable.encoder.data_of(split)):
        raise UserError(f"--split {split}: the data set has no such images; take another split")
    trained_on = "train" if len(dataset.train_x) and not dataset.test_only else split
    of_regions = _splits_of_regions(trainer) if options.regions else []
    readable.compute(list(dict.fromkeys((trained_on, split, *of_regions))))
    encoder = readable.encoder
    with evaluating(trainer.learner, *trainer.debiasers):
        logits = encoder.outputs(split, trainer.learner, trainer.objective.predict)[1]
    images, train = encoder.data_of(split), encoder.data_of(trained_on)
    evaluated = _Evaluated(
        split,
        images,
        images.label,
        logits.argmax(dim=1).cpu().numpy(),
        encoder.frozen_features_of(split).cpu().float(),
        told_apart(dataset.classnames),
    )
    captions = [image.caption for image in train] if options.vocabulary == "captions" else []
    vocabulary = read_vocabulary(options.vocabulary, options.sensitive, captions)
    found = find_proposals(
        trainer.clip,
        dataset.classnames,
        dataset.template,
        encoder.frozen_features_of(trained_on),
        train.label,
        vocabulary,
        options.most,
        encoder.show_progress,
    )
    predicted, label, attribute = (
        torch.from_numpy(column).long() for column in (evaluated.predicted, images.label, images.attribute)
    )
    metrics = group_metrics(predicted, label, attribute, train, dataset)
    content = {
        "format": FORMAT,
        "version": VERSION,
        "split": split,
        "trained_on": trained_on,
        "num_train": len(train),
        "num_images": len(images),
        "accuracy": metrics["accuracy"],
        "classnames": evaluated.names,
        "classes": metrics["classes"],
        "groups": metrics["groups"],
        "num_unreadable": len(readable.unreadable),
        "unreadable": dict(list(readable.unreadable.items())[:_UNREADABLE]),
        "vocabulary": _vocabulary(found),
        "criterion": {"v_at_least": STRONG, "level": LEVEL},
        "proposals": [_proposal(found, proposal, evaluated) for proposal in found.proposals],
        "keywords": _keywords(found.words, evaluated),
        "regions": None,
    }
    return Looked(json_value(content), images, found.words, readable)


def _splits_of_regions(trainer: PromptTrainer) -> list[str]:
    """The splits that discovery looks at. ``UserError`` ahead of all work where it cannot run."""
    trainer.dataset.need_pixels("--regions looks at regions of images")
    own, encoder = trainer.cfg.DISCOVERY.SPLIT, trainer.encoder
    if not len(encoder.data_of(own)):
        raise UserError(f"--regions: the data set has no {own} images; give DISCOVERY.SPLIT another split")
    return [own, *(split for split in ("train", "val") if len(encoder.data_of(split)))]


def _vocabulary(found: Proposals) -> dict[str, Any]:
    words = found.words
    return {
        "source": found.vocabulary.source,
        "words": len(found.vocabulary.words),
        "sensitive_left_out": found.vocabulary.left_out,
        "unknown": list(words.unknown),
        "of_class": [{"word": word, "class": name} for word, name in words.of_class],
        "tested": found.tested,
        "too_rare": found.too_rare,
        "further": found.further,
    }


def _proposal(found: Proposals, proposal: Proposal, e: _Evaluated) -> dict[str, Any]:
    best = proposal.best
    score, present = found.present(proposal, e.features)
    effect = effect_of(present, e.label, e.right, best.lift, max(len(found.proposals), 1))
    return {
        "word": found.word(best),
        "same": [_word(found, a) for a in proposal.same],
        "opposite": [_word(found, a) for a in proposal.opposite],
        "names": list(proposal.names),
        "agreement": proposal.agreement,
        "strong": proposal.strong,
        "v": best.v,
        "low": best.low,
        "high": best.high,
        "raw_v": best.raw,
        "p": best.p,
        "after_stronger": list(proposal.after),
        "clarity": best.split.clarity,
        "share": best.share,
        "goes_with": e.names[proposal.goes_with],
        "rarely_with": e.names[proposal.rarely_with],
        "effect": {"gap": effect.gap, "low": effect.low, "high": effect.high, "relies": effect.relies},
        "classes": _cells(best, effect, e.names),
        "images": _images(found.word(best), proposal, score, present, e),
    }


def _word(found: Proposals, a: Association) -> dict[str, Any]:
    return {"word": found.word(a), "v": a.v}


def _cells(best: Association, effect: Effect, names: Sequence[str]) -> list[dict[str, Any]]:
    """The classes by presence, those first in which the share of images with the word is most unlike the others'."""

    def cell(one: Cell, trained: int) -> dict[str, Any]:
        accuracy = one.right / one.number if one.number else None
        return {"train": trained, "number": one.number, "right": one.right, "accuracy": accuracy}

    rows = []
    for number in np.argsort(-np.abs(best.lift), kind="stable").tolist():
        without, with_it = effect.cells[number]
        counts = best.table[number].tolist()
        rows.append({"class": names[number], "with": cell(with_it, counts[1]), "without": cell(without, counts[0])})
    return rows


def _images(word: str, proposal: Proposal, score: Numbers, present: Flags, e: _Evaluated) -> list[dict[str, Any]]:
    """Examples: the class with the word and without it, and the class that has it least, with it."""
    goes, rarely = proposal.goes_with, proposal.rarely_with
    order = np.argsort(-score, kind="stable")
    kinds = [(goes, True, order), (goes, False, order[::-1]), (rarely, True, order), (rarely, False, order[::-1])]
    galleries = []
    for number, value, by in kinds:
        chosen = [int(i) for i in by if e.label[i] == number and present[i] == value]
        rows = [
            {
                "index": i,
                "image": e.images.impath(i),
                "true": e.names[e.label[i]],
                "predicted": e.names[e.predicted[i]],
            }
            for i in chosen[:_EXAMPLES]
        ]
        galleries.append({"class": e.names[number], "with": value, "number": len(chosen), "rows": rows})
    return galleries


def _keywords(words: Words, e: _Evaluated) -> list[dict[str, Any]]:
    captions = [image.caption for image in e.images] if e.images.captions is not None else []
    found = keywords(words, e.features, e.label, e.right, len(e.names), captions if any(captions) else None)
    wrong = [int((~e.right & (e.label == number)).sum()) for number in range(len(e.names))]
    return [
        {"class": name, "wrong": count, "words": [{"word": k.word, "score": k.score} for k in of_class]}
        for name, count, of_class in zip(e.names, wrong, found, strict=True)
        if of_class
    ]
