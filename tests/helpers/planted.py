"""Regions with a planted feature that explains the errors of a classifier."""

from __future__ import annotations

import numpy as np

from oodprompt.studies.baselines import BASELINE_VARIANTS, DISCOVERY_BASELINES

CLASSES = 3
EVERY = [(name, variant) for name in DISCOVERY_BASELINES for variant in BASELINE_VARIANTS[name]]
IDS = ["-".join(map(str, [name, *variant.values()])) for name, variant in EVERY]
OF_SAMPLES = ("Distilling Failures", "George", "Domino")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def one_hot(classes: np.ndarray, count: int = CLASSES) -> np.ndarray:
    return np.eye(count)[classes]


def soft(classes: np.ndarray, count: int = CLASSES) -> np.ndarray:
    return 0.8 * one_hot(classes, count) + 0.2 / count


def planted(seed: int = 0, images: int = 90) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images of an item, an empty region, and in half of them a rectangle, which nine times in ten says class 0.

    Class 0 without a rectangle is wrong every second time. By itself a rectangle looks like class 0, an empty
    region like its image's class, and an item like its class. Returns the inputs and which regions are rectangles.
    """
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(CLASSES + 2, 12)))
    label = np.arange(images) % CLASSES
    has = rng.random(images) < 0.5
    u = rng.random(images)
    predicted = np.where(has & (u < 0.9), 0, np.where((label == 0) & ~has & (u < 0.5), 1, label))
    owner, what, looks = [], [], []
    for i in range(images):
        for centre, look in [(label[i], label[i]), (CLASSES, label[i])] + [(CLASSES + 1, 0)] * int(has[i]):
            owner.append(i), what.append(centre), looks.append(look)
    features = unit(centres[what] + 0.08 * rng.normal(size=(len(what), 12)))
    inputs = {
        "region_features": features.astype(np.float32),
        "owner": np.array(owner),
        "region_scores": soft(np.array(looks)),
        "image_scores": soft(predicted),
        "label": label,
    }
    return inputs, np.array(what) == CLASSES + 1


def without_errors(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    label, owner = inputs["label"], inputs["owner"]
    return inputs | {"image_scores": soft(label), "region_scores": soft(label[owner])}
