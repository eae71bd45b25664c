"""RaVL's discovery in a trained model, on labelled images of a split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.data.columns import Images
from oodprompt.discovery import keys as _declares_the_keys  # noqa: F401
from oodprompt.discovery.ravl import assign, discover
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.discovery.result import Discovery
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.methods.attributes import DiscoveredClusters
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.regions.boxes import Regions


@dataclass(frozen=True)
class DiscoveryRun:
    """What discovery found in a model, with what it looked at.

    ``clusters`` that count as spurious, with the cluster of every region of the training and validation splits;
    ``regions`` [r] of the images of ``split`` and their ``features`` [r, d]; ``label`` [n] and ``predicted`` [n] of the
    images; ``planted`` [r] says which regions are known to be spurious (None: unknown).
    """

    discovery: Discovery
    clusters: DiscoveredClusters
    split: str
    regions: Regions
    features: Tensor
    label: np.ndarray
    predicted: np.ndarray
    ks: range
    planted: np.ndarray | None = None


@torch.no_grad()
def run_discovery(
    cfg: CfgNode,
    encoder: Encoder,
    learner: PromptLearner,
    predict: Callable[[Alignment], Tensor],
    region_features: RegionFeatures,
    where: str = "",
) -> DiscoveryRun:
    """Discovery in the model ``predict`` over ``learner``, by DISCOVERY.*.

    ``where`` says where the result will be found, for later errors. Models must be in evaluation mode. ``UserError``
    where the split has no images.
    """
    keys, split = cfg.DISCOVERY, cfg.DISCOVERY.SPLIT
    data = _labelled_images(encoder, split)
    regions, features = region_features.regions(split), region_features.of(split, learner)
    label = np.array([datum.label for datum in data])
    logits = encoder.outputs(split, learner, predict)[1]
    ks = _numbers_of_clusters(keys, encoder.data.num_classes)
    discovery = discover(
        features,
        regions.owner,
        region_scores(encoder, learner, predict, features, keys.TEMPERATURE),
        logits.softmax(dim=1),
        label,
        ks=ks,
        threshold=keys.THRESHOLD,
        both_signs=keys.BOTH_SIGNS,
        seed=cfg.SEED,
        show=encoder.show_progress,
    )
    clusters = _assigned(cfg, encoder, learner, discovery, region_features, where)
    predicted = logits.argmax(dim=1).cpu().numpy()
    planted = _planted(keys.PLANTED, regions, split)
    return DiscoveryRun(discovery, clusters, split, regions, features, label, predicted, ks, planted)


def _labelled_images(encoder: Encoder, split: str) -> Images:
    """The images that discovery looks at; ``UserError`` where there are none."""
    data = encoder.data_of(split)
    if not data:
        raise UserError(f"DISCOVERY.SPLIT {split}: the data set has no such images; give labelled validation images")
    return data


def _numbers_of_clusters(keys: CfgNode, classes: int) -> range:
    """The numbers of clusters to try: DISCOVERY.K_RANGE, or 2 C to 5 C - 1 for C classes."""
    ends = keys.K_RANGE
    return range(ends[0], ends[1] + 1) if ends else range(2 * classes, 5 * classes)


@torch.no_grad()
def region_scores(
    encoder: Encoder,
    learner: PromptLearner,
    predict: Callable[[Alignment], Tensor],
    features: Tensor,
    temperature: float,
) -> Tensor:
    """softmax(<region, text> / temperature) [r, C], in parts: text may depend on the region.

    Models must be in evaluation mode.
    """
    parts = []
    for some in features.split(1000 if encoder.data.num_classes < 100 else 50):
        alignment = encoder.align({"image_features": some}, learner)
        parts.append((predict(alignment) / (alignment.logit_scale * temperature)).softmax(dim=1))
    return torch.cat(parts)


def _assigned(
    cfg: CfgNode,
    encoder: Encoder,
    learner: PromptLearner,
    discovery: Discovery,
    region_features: RegionFeatures,
    where: str,
) -> DiscoveredClusters:
    """The clusters that count; the cluster of every region of the other splits is that of the nearest medoid."""
    own = cfg.DISCOVERY.SPLIT
    of_medoids = torch.from_numpy(discovery.clustering.medoids).long()
    medoids = region_features.of(own, learner)[of_medoids].cpu().numpy()
    clusters = tuple(cluster.index for cluster in discovery.survivors[: cfg.DISCOVERY.CLUSTERS])
    assignment = {own: torch.from_numpy(discovery.clustering.assignment).long()}
    for split in ("train", "val"):
        if split not in assignment and clusters and encoder.data_of(split):
            features = region_features.of(split, learner).cpu().numpy()
            assignment[split] = torch.from_numpy(assign(features, medoids)).long()
    owner = {split: region_features.regions(split).owner for split in assignment}
    return DiscoveredClusters(clusters, assignment, owner, where)


def _planted(name: str, regions: Regions, split: str) -> np.ndarray | None:
    """Which regions are called ``name``, [r] bool; None without a name. ``UserError`` where none is."""
    if not name:
        return None
    planted = np.array([of_region == name for of_region in regions.names])
    if not planted.any():
        known = sorted(set(regions.names))[:10] or "none: REGIONS.FILE names regions"
        raise UserError(f"DISCOVERY.PLANTED: no region of {split} is called {name!r} (names: {known})")
    return planted
