"""Features of the regions of a whole split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones.devices import to_device
from oodprompt.data.distributed import (
    gather_rows,
    number_of_processes,
    part_sizes,
    sum_over_processes,
    whole_index,
)
from oodprompt.data.images import PixelRules
from oodprompt.data.loading import Batch, Loader
from oodprompt.features.cache import FeatureCache, Views
from oodprompt.features.encoder import Encoder, evaluating
from oodprompt.features.views import whole
from oodprompt.log import progress
from oodprompt.memory import memory_for
from oodprompt.methods.contracts import PromptLearner, StepRegions
from oodprompt.regions.boxes import Regions, digest, per_image, rows_of_images
from oodprompt.regions.sources import build_regions


class RegionFeatures:
    """The regions of each split by REGIONS.*, and their features; both are made once where they stay what they are."""

    def __init__(self, cfg: CfgNode, encoder: Encoder) -> None:
        self.cfg, self.encoder = cfg, encoder
        self._regions: dict[str, Regions] = {}
        self._kept: dict[str, Tensor] = {}

    def regions(self, split: str) -> Regions:
        """The regions of a split. ``UserError`` where ``build_regions`` has one."""
        if split not in self._regions:
            self.encoder.data.dataset.need_pixels("regions are parts of images")
            keys = self.cfg.REGIONS
            self._regions[split] = build_regions(
                keys.SOURCE,
                list(self.encoder.data_of(split).impaths),
                tuple(self.cfg.INPUT.SIZE),
                keys.FILE,
                tuple(keys.GRID),
                keys.OVERLAP,
                keys.PER_IMAGE,
                self.encoder.device,
                self.encoder.show_progress,
                PixelRules.of(self.cfg),
                self.cfg.INPUT.RESIZE,
            )
        return self._regions[split]

    def keeps(self, learner: PromptLearner) -> bool:
        """Whether features of regions by ``learner`` are computed once, as its image tower is frozen."""
        return not learner.trains_image_tower and self.cfg.DATALOADER.FEATURE_CACHE != "off"

    @torch.no_grad()
    def of(self, split: str, learner: PromptLearner) -> Tensor:
        """L2-normalised features [r, d] of the regions of a split by ``learner``, not augmented."""
        encoder, keeps = self.encoder, self.keeps(learner)
        if keeps and split in self._kept:
            return self._kept[split]
        how = self.cfg.REGIONS.FEATURES

        def encode(images: Tensor, boxes: list[Tensor]) -> Tensor:
            with encoder.autocast():
                return learner.encode_regions(images.to(encoder.device, non_blocking=True), boxes, how).float()

        loader = encoder.data.loader(encoder.data_of(split))
        cache = encoder.cache if keeps and learner.encodes_as_clip else None
        with evaluating(learner):
            view = region_view(split, loader, encode, self.regions(split), how, encoder.show_progress, cache)[0]
        features = whole(view, encoder.device)
        if keeps:
            self._kept[split] = features
        return features

    def of_step(self, batch: Batch) -> StepRegions:
        """The regions of the images of the batch of all processes, by the run's learner; with gradients where it trains."""
        encoder, learner = self.encoder, self.encoder.learner
        regions = self.regions("train")
        # All on the CPU, where every process knows the images, and so the regions, of all.
        whole = whole_index(batch).cpu()
        rows, image = rows_of_images(regions, whole)
        rows_there, image_there = to_device(torch.stack([rows, image]), encoder.device).unbind()
        if self.keeps(learner):
            return StepRegions(self.of("train", learner)[rows_there], image_there, rows_there)
        images = batch["img"].to(encoder.device, non_blocking=True)
        numbers = torch.bincount(image, minlength=len(whole)).split(part_sizes(len(whole), number_of_processes()))
        sizes = [int(number.sum()) for number in numbers]
        own = encoder.data.rank
        boxes = regions.boxes[rows].split(sizes)[own].split(numbers[own].tolist())
        with encoder.autocast():
            z = learner.encode_regions(images, boxes, self.cfg.REGIONS.FEATURES).float()
        return StepRegions(gather_rows(z, sizes=sizes), image_there, rows_there)


@torch.no_grad()
def extract_region_features(
    encode: Callable[[Tensor, list[Tensor]], Tensor],
    loader: Loader,
    regions: Regions,
    title: str = "Features of regions",
    show: bool = True,
) -> Tensor:
    """L2-normalised features of all regions, [r, d] float32 on the encoder's device; processes share the work.

    ``encode`` takes images [B, 3, R, R] and their boxes (B tensors [n_i, 4]), as ``CLIP.region_features`` does, and
    returns [sum n_i, d]. Each image of ``loader``, whose transform must be that of testing, is read once.
    """
    total = len(loader.dataset)
    features: Tensor | None = None
    boxes = per_image(regions, total)
    keys = loader.batches.cfg
    with (
        memory_for(
            f"while computing: {title}",
            lambda: (
                f"Lower DATALOADER.TEST.BATCH_SIZE (now {keys.DATALOADER.TEST.BATCH_SIZE}), or the regions of an image "
                "(REGIONS.GRID, REGIONS.PER_IMAGE)"
            ),
        ),
        progress(total, title, "image", show) as bar,
    ):
        for batch in loader:
            index = batch["index"]
            z = F.normalize(encode(batch["img"], [boxes[i] for i in index.tolist()]).float(), dim=-1)
            if features is None:
                features = z.new_zeros(len(regions.owner), z.shape[1])
            rows, _ = rows_of_images(regions, index)
            features[rows.to(z.device)] = z
            bar.update(len(index))
    assert features is not None, "every split whose regions are encoded has images"
    return sum_over_processes(features)


def region_view(
    split: str,
    loader: Loader,
    encode: Callable[[Tensor, list[Tensor]], Tensor],
    regions: Regions,
    how: str,
    show: bool = True,
    cache: FeatureCache | None = None,
) -> Views:
    """The features of the regions of an evaluation split as one view, [1, r, d]; kept as ``cache`` keeps images'.

    ``how`` names what ``encode`` makes of a region, as in ``CLIP.region_features``: files are named by it.
    """

    def compute(view: int, start: int = 0) -> Iterator[Tensor]:
        yield extract_region_features(encode, loader, regions, f"Features of {split} regions", show)[start:]

    if cache is None:
        return next(compute(0))[None]
    rows, images = len(regions.owner), loader.dataset.data_source
    return cache.views(f"regions of {split}", images, 1, False, compute, rows, f"regions {digest(regions, how)}")
