"""Discovery of spurious regions in a trained model, inside a run or for the run of another day (scripts/discover.py)."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from oodprompt.data.images import read_image
from oodprompt.data.transforms import build_transform
from oodprompt.discovery import keys as _keys  # noqa: F401  declares DISCOVERY.*
from oodprompt.discovery.ravl import assign, discover
from oodprompt.discovery.region_features import region_view
from oodprompt.discovery.result import Discovery
from oodprompt.engine.first_stage import evaluating, fit_alone, outputs
from oodprompt.errors import UserError
from oodprompt.features.views import whole
from oodprompt.files import write_atomically
from oodprompt.methods.attributes import Found
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.regions.boxes import Regions, digest
from oodprompt.regions.sources import build_regions
from oodprompt.reports.discovery import FILE, discovery_table, read_discovery, write_discovery

if TYPE_CHECKING:
    from oodprompt.engine.trainer import PromptTrainer

_CLUSTERS_FILE = "discovery.npz"


def regions_of(trainer: PromptTrainer, split: str) -> Regions:
    """The regions of a split by REGIONS.*, made once."""
    if split not in trainer.regions:
        keys = trainer.cfg.REGIONS
        paths = [datum.impath for datum in trainer.data_of(split)]
        trainer.regions[split] = build_regions(
            keys.SOURCE,
            paths,
            tuple(trainer.cfg.INPUT.SIZE),
            keys.FILE,
            tuple(keys.GRID),
            keys.OVERLAP,
            keys.PER_IMAGE,
            trainer.device,
            trainer.shows,
        )
    return trainer.regions[split]


@torch.no_grad()
def region_features(trainer: PromptTrainer, split: str, learner: PromptLearner) -> Tensor:
    """L2-normalised features [r, d] of the regions of a split by ``learner``, not augmented; kept where it is frozen."""
    kept = keeps_regions(trainer, learner)
    if kept and split in trainer.region_cache:
        return trainer.region_cache[split]
    how = trainer.cfg.REGIONS.FEATURES

    def encode(images: Tensor, boxes: list[Tensor]) -> Tensor:
        with trainer.autocast():
            return learner.encode_regions(images.to(trainer.device, non_blocking=True), boxes, how).float()

    loader = trainer.dm.loader(trainer.data_of(split))
    cache = trainer.feature_cache if kept and learner.encodes_as_clip else None
    with evaluating(trainer, learner):
        view = region_view(split, loader, encode, regions_of(trainer, split), how, trainer.shows, cache)[0]
    features = whole(view, trainer.device)
    if kept:
        trainer.region_cache[split] = features
    return features


def keeps_regions(trainer: PromptTrainer, learner: PromptLearner) -> bool:
    """Whether features of regions stay what they are, so that they are computed once."""
    return not learner.trains_image_tower and trainer.cfg.DATALOADER.FEATURE_CACHE != "off"


def find(trainer: PromptTrainer) -> Found:
    """What the debiasers of a run are given: what this run found before, what DISCOVERY.FROM holds, or a new discovery
    in the base, trained alone.
    """
    source = trainer.cfg.DISCOVERY.FROM
    if source:
        return read_found(trainer, Path(source))
    for directory in (trainer.output_dir, Path(trainer.cfg.RESUME)):
        if trainer.start_epoch and (directory / _CLUSTERS_FILE).is_file():
            return read_found(trainer, directory)
    epochs = trainer.cfg.DISCOVERY.EPOCHS or trainer.cfg.OPTIM.MAX_EPOCH
    trainer.print(f"Discovery: {trainer.base_name} is trained alone first, for {epochs} epochs")
    learner, _ = fit_alone(trainer, epochs)
    title = f"{trainer.base_name}, trained alone"
    return run(trainer, learner, lambda alignment: alignment.logits, title, trainer.output_dir)


@torch.no_grad()
def run(
    trainer: PromptTrainer,
    learner: PromptLearner,
    predict: Callable[[Alignment], Tensor],
    title: str,
    directory: Path,
    pictures: bool = True,
) -> Found:
    """RaVL's discovery in the model ``predict`` over ``learner``; writes its files to ``directory``, prints the table.

    ``pictures``: whether the page and the figure are among the files.
    """
    keys, split = trainer.cfg.DISCOVERY, trainer.cfg.DISCOVERY.SPLIT
    data = discovery_data(trainer)
    regions = regions_of(trainer, split)
    features = region_features(trainer, split, learner)
    label = np.array([datum.label for datum in data])
    logits = outputs(trainer, split, learner, predict)[1]
    discovery = discover(
        features,
        regions.owner,
        region_scores(trainer, learner, predict, features),
        logits.softmax(dim=1),
        label,
        ks=k_range(trainer),
        threshold=keys.THRESHOLD,
        both_signs=keys.BOTH_SIGNS,
        seed=trainer.cfg.SEED,
        show=trainer.shows,
    )
    found = _assigned(trainer, learner, discovery, directory)
    if trainer.state.is_main_process:
        _write(
            trainer,
            found,
            discovery,
            regions,
            features,
            label,
            logits.argmax(dim=1).cpu().numpy(),
            title,
            directory,
            pictures,
        )
    return found


def discovery_data(trainer: PromptTrainer) -> Any:
    """The images that discovery looks at; ``UserError`` where there are none."""
    split = trainer.cfg.DISCOVERY.SPLIT
    data = trainer.data_of(split)
    if not data:
        raise UserError(f"DISCOVERY.SPLIT {split}: the data set has no such images; give labelled validation images")
    return data


def counted(trainer: PromptTrainer) -> int:
    """How many clusters count as spurious."""
    return trainer.cfg.DISCOVERY.CLUSTERS


def k_range(trainer: PromptTrainer) -> range | None:
    """The numbers of clusters that DISCOVERY.K_RANGE asks for; None: the default."""
    ends = trainer.cfg.DISCOVERY.K_RANGE
    return range(ends[0], ends[1] + 1) if ends else None


def region_scores(
    trainer: PromptTrainer, learner: PromptLearner, predict: Callable[[Alignment], Tensor], features: Tensor
) -> Tensor:
    """softmax(<region, text> / temperature) [r, C], in parts: text may depend on the region."""
    parts, temperature = [], trainer.cfg.DISCOVERY.TEMPERATURE
    with torch.no_grad(), evaluating(trainer, learner):
        for some in features.split(1000 if trainer.num_classes < 100 else 50):
            alignment = trainer.align({"image_features": some}, learner)
            parts.append((predict(alignment) / (alignment.logit_scale * temperature)).softmax(dim=1))
    return torch.cat(parts)


def _assigned(trainer: PromptTrainer, learner: PromptLearner, discovery: Discovery, directory: Path) -> Found:
    """The cluster of every region of the other splits is that of the nearest medoid."""
    own = trainer.cfg.DISCOVERY.SPLIT
    medoids = (
        region_features(trainer, own, learner)[torch.from_numpy(discovery.clustering.medoids).long()].cpu().numpy()
    )
    clusters = tuple(cluster.index for cluster in discovery.survivors[: counted(trainer)])
    assignment = {own: torch.from_numpy(discovery.clustering.assignment).long()}
    for split in ("train", "val"):
        if split not in assignment and clusters and trainer.data_of(split):
            features = region_features(trainer, split, learner).cpu().numpy()
            assignment[split] = torch.from_numpy(assign(features, medoids)).long()
    owner = {split: regions_of(trainer, split).owner for split in assignment}
    return Found(clusters, assignment, owner, str(directory / FILE))


def _write(
    trainer: PromptTrainer,
    found: Found,
    discovery: Discovery,
    regions: Regions,
    features: Tensor,
    label: np.ndarray,
    predicted: np.ndarray,
    title: str,
    directory: Path,
    pictures: bool,
) -> None:
    cfg, split = trainer.cfg, trainer.cfg.DISCOVERY.SPLIT
    data = trainer.data_of(split)
    look = build_transform(_plain_pixels(cfg), is_train=False)

    def load(index: int) -> Image.Image:
        pixels = look(read_image(data[index].impath))
        return Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy())

    truth = np.array([name == cfg.DISCOVERY.PLANTED for name in regions.names]) if cfg.DISCOVERY.PLANTED else None
    if truth is not None and not truth.any():
        known = sorted(set(regions.names))[:10] or "none: REGIONS.FILE names regions"
        raise UserError(f"DISCOVERY.PLANTED: no region of {split} is called {cfg.DISCOVERY.PLANTED!r} (names: {known})")
    ks = k_range(trainer) or range(2 * trainer.num_classes, 5 * trainer.num_classes)
    facts = {
        "model": title,
        "data": f"{cfg.DATASET.NAME}, {split} ({len(data):,} images)",
        "backbone": cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
        "regions": regions.source or cfg.REGIONS.SOURCE,
        "features of regions": cfg.REGIONS.FEATURES,
        "numbers of clusters": f"{ks[0]} to {ks[-1]}",
        "influence at least": f"{cfg.DISCOVERY.THRESHOLD:g}",
        "seed": str(cfg.SEED),
    }
    files = write_discovery(
        discovery,
        regions,
        [datum.impath for datum in data],
        label,
        predicted,
        trainer.learner.classnames,
        load,
        directory,
        title=f"What {title} goes by on {cfg.DATASET.NAME}",
        facts=facts,
        truth=truth,
        pictures=pictures,
        extra={"spurious_clusters": list(found.clusters)},
    )
    arrays = {f"assignment_{name}": value.numpy() for name, value in found.assignment.items()}
    arrays |= {f"digest_{name}": np.array(digest(regions_of(trainer, name))) for name in found.assignment}
    medoids = features.cpu().numpy()[discovery.clustering.medoids]
    buffer = io.BytesIO()
    np.savez(buffer, clusters=np.array([c.index for c in discovery.survivors], np.int64), medoids=medoids, **arrays)
    write_atomically(directory / _CLUSTERS_FILE, buffer.getvalue())
    trainer.print(discovery_table(read_discovery(directory)), "Wrote " + ", ".join(str(file) for file in files))


def _plain_pixels(cfg: Any) -> Any:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.TRANSFORMS = ()
    return cfg


def read_found(trainer: PromptTrainer, directory: Path) -> Found:
    """What ``run`` wrote; ``UserError`` where the regions of now are others."""
    path = directory / _CLUSTERS_FILE if directory.is_dir() else directory
    if not path.is_file():
        raise UserError(
            f"DISCOVERY.FROM: there is no {path}; give the folder of a run, after: python scripts/discover.py --model-dir "
            f"{directory}"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        clusters = tuple(content["clusters"].tolist())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not what scripts/discover.py writes ({error}); run it again") from error
    assignment, owner = {}, {}
    for name, value in content.items():
        if name.startswith("assignment_"):
            split = name.removeprefix("assignment_")
            regions = regions_of(trainer, split)
            if str(content[f"digest_{split}"]) != digest(regions):
                raise UserError(
                    f"DISCOVERY.FROM: {path} is of other regions of the {split} images ({len(value):,}, now "
                    f"{len(regions.owner):,}); use the same data set, INPUT and REGIONS.* as in that run"
                )
            assignment[split], owner[split] = torch.from_numpy(value).long(), regions.owner
    return Found(clusters[: counted(trainer)], assignment, owner, str(directory / FILE))
