"""Features of the regions of a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from oodprompt.data.distributed import sum_over_processes

if TYPE_CHECKING:  # what the engine is built of may import this module
    from oodprompt.data.loading import Loader
    from oodprompt.features.cache import FeatureCache, Views

from oodprompt.regions.boxes import Regions, digest, per_image, rows_of_images


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
    total, features = len(loader.dataset), None
    boxes = per_image(regions, total)
    with tqdm(total=total, desc=title, unit="image", disable=None if show else True, leave=False) as bar:
        for batch in loader:
            index = batch["index"]
            z = F.normalize(encode(batch["img"], [boxes[i] for i in index.tolist()]).float(), dim=-1)
            if features is None:
                features = z.new_zeros(len(regions.owner), z.shape[1])
            rows, _ = rows_of_images(regions, index)
            features[rows.to(z.device)] = z
            bar.update(len(index))
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

    def compute(view: int) -> Tensor:
        return extract_region_features(encode, loader, regions, f"Features of {split} regions", show)

    if cache is None:
        return compute(0)[None]
    rows, images = len(regions.owner), loader.dataset.data_source
    return cache.views(f"regions of {split}", images, 1, False, compute, rows, f"regions {digest(regions, how)}")
