"""The check of a data set before a run (``--no-train``): its images, its groups, and its texts in tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from yacs.config import CfgNode

from oodprompt.backbones.tokenizer import Tokenizer
from oodprompt.data.check import Finding, Report, check_data
from oodprompt.data.dataset import DatasetBase
from oodprompt.data.images import PixelRules
from oodprompt.data.transforms import build_transform
from oodprompt.log import logger

_EXAMPLES = 3


def check_images(cfg: CfgNode, dataset: DatasetBase, until: float = math.inf, show: bool = True) -> Report:
    """``check_data`` with the pixels and the view of a run with ``cfg``, without what is black around an image."""
    view = build_transform(cfg, is_train=False).transforms[0]
    if view.resize == "longest":
        view = replace(view, resize="squash")  # it shows the same
    return check_data(dataset, PixelRules.of(cfg), view, until, show)


def check_texts(dataset: DatasetBase, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Prompts and captions that have more tokens than the text encoder takes, start and end among them."""
    prompts = [dataset.template.format(name.replace("_", " ")) for name in dataset.classnames]
    prompts += [prompt for entry in dataset.attribute_prompts for prompt in entry]
    kinds = {
        "prompts of classes and attribute values": prompts,
        "captions of training images": (datum.caption for datum in dataset.train_x),
    }
    for kind, texts in kinds.items():
        number, total, examples = 0, 0, list[str]()
        for text in texts:
            total += bool(text)
            if tokenizer.is_too_long(text):
                number += 1
                examples += [f"{text[:60]!r}..."] * (len(examples) < _EXAMPLES)
        if number:
            words = f"have more than {tokenizer.context_length} tokens, all that the text encoder takes"
            yield Finding(f"{number:,} of {total:,} {kind} {words}", tuple(examples))


def check_run(cfg: CfgNode, dataset: DatasetBase, tokenizer: Tokenizer, notes: Sequence[str] = ()) -> str:
    """Say what the check finds, a line per kind; returns the verdict. ``UserError`` names images that cannot be read.

    ``notes`` are what is known of the data set without a look at its images (``notes_on``).
    """
    if not dataset.has_pixels:
        return _check_features(dataset, tokenizer, notes)
    report = check_images(cfg, dataset)
    if (error := report.error()) is not None:
        raise error
    findings = [*map(Finding, notes), *report.findings, *check_texts(dataset, tokenizer)]
    for finding in findings:
        logger.warning(f"Note: {finding}")
    if not findings:
        return f"Config, weights and all {report.images:,} images are in order; nothing is trained (--no-train)"
    notes = "the note above tells" if len(findings) == 1 else f"the {len(findings)} notes above tell"
    return (
        f"Config and weights are in order, and all {report.images:,} images can be read; {notes} what to look at; "
        "nothing is trained (--no-train)"
    )


def _check_features(dataset: DatasetBase, tokenizer: Tokenizer, notes: Sequence[str]) -> str:
    """``check_run`` for features in place of images, which were looked at when they were opened."""
    findings = [*notes, *map(str, check_texts(dataset, tokenizer))]
    for finding in findings:
        logger.warning(f"Note: {finding}")
    rows = len(dataset.train_x) + len(dataset.val) + len(dataset.test)
    look = "; the notes above tell what to look at" if findings else ""
    return (
        f"Config, weights and all {rows:,} rows of image features are in order{look}; nothing is trained (--no-train)"
    )
