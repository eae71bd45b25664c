"""A made-up discovery, small enough to check what is written of it by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from oodprompt.discovery.result import Cluster, Clustering, Discovery, Gap
from oodprompt.regions.boxes import Regions
from oodprompt.reports.discovery import read_discovery, write_discovery

# Of each class 10 images in a row: the first n_in have cluster 1, and the first so many of both parts are right.
CLASSES = ("one", "seven", "nine")
WITH = ((6, 0), (5, 4), (4, 4))  # class -> images with the cluster, right ones of them
WITHOUT_RIGHT = (4, 4, 1)
PLANTED = 1


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True class, predicted class, and whether the image has cluster 1, of 30 images."""
    label, predicted, has = [], [], []
    for y, ((n_in, right), right_out) in enumerate(zip(WITH, WITHOUT_RIGHT, strict=True)):
        label += [y] * 10
        has += [True] * n_in + [False] * (10 - n_in)
        for n, k in ((n_in, right), (10 - n_in, right_out)):
            predicted += [y] * k + [(y + 2) % 3 if y < 1 else (y + 1) % 3] * (n - k)
    return np.array(label), np.array(predicted), np.array(has)


def load(index: int) -> Image.Image:
    """16 by 16 noise, another for every image."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def arguments(survive: bool = True, **changes: Any) -> dict[str, Any]:
    """Two regions, left and right, of each of 30 images; the right one is in cluster 1 where the image has it.

    Cluster 0: the left halves; 2: the other right halves. Cluster 1 alone survives, if any does.
    """
    label, predicted, has = images()
    assignment = np.array([(0, 1 if here else 2) for here in has]).ravel()
    boxes = torch.tensor([(0, 0, 0.5, 1), (0.5, 0, 1, 0.75)] * 30, dtype=torch.float32)
    gaps = tuple(
        Gap(y, right / n, n, right_out / (10 - n), 10 - n)
        for y, ((n, right), right_out) in enumerate(zip(WITH, WITHOUT_RIGHT, strict=True))
    )
    own = [np.flatnonzero(assignment == c) for c in range(3)]
    planted = np.concatenate([own[1][4:], own[1][:4]])  # nearest to the medoid first
    similar = [np.linspace(1, 0.5, len(regions)) for regions in own]
    clusters = (
        Cluster(1, int(planted[0]), planted, similar[1], gaps, 0.75, survive, "" if survive else "too few"),
        Cluster(2, int(own[2][0]), own[2], similar[2], gaps[:1], 0.1, False, "influence 0.10 < 0.25"),
        Cluster(0, int(own[0][0]), own[0], similar[0], (), -np.inf, False, "no class <both> with and without"),
    )
    clustering = Clustering(assignment, np.array([0, planted[0], 1]), 12.5, 0.625, {3: 0.625, 4: 0.5, 5: float("nan")})
    return {
        "discovery": Discovery(clustering, clusters),
        "regions": Regions(boxes, torch.arange(30).repeat_interleave(2), source="halves"),
        "images": [f"data/{i:03d}.png" for i in range(30)],
        "label": label,
        "predicted": predicted,
        "classnames": CLASSES,
        "load": load,
        "title": "Discovery on digits",
        "facts": {"model": "CoOp", "threshold": "0.25"},
    } | changes


def many(count: int, survivors: int) -> Discovery:
    """``count`` clusters, each with the regions of cluster 1, of which the first ``survivors`` survive."""
    given = arguments()["discovery"]
    first = given.clusters[0]
    return dataclasses.replace(
        given,
        clusters=tuple(
            dataclasses.replace(first, index=i, survives=i < survivors, reason=f"because {i}") for i in range(count)
        ),
    )


def written(directory: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The json and the page; the figure is left blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("oodprompt.reports.discovery.discovery_figure", lambda *_: Figure())
        write_discovery(directory=directory, **arguments(**changes))
    return read_discovery(directory), (directory / "discovery.html").read_text(encoding="utf-8")


def card(page: str, index: int) -> str:
    """The markup of one cluster's card."""
    return page.split(f'id="c{index}"')[1].split("</article>")[0]
