"""From batches of images, or of kept image features, to alignments."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.backbones.devices import to_device
from oodprompt.data.columns import Images
from oodprompt.data.datum import Datum
from oodprompt.data.distributed import gather_together, whole_index
from oodprompt.data.loading import Batch, DataManager
from oodprompt.data.sampling import EpochBatches
from oodprompt.data.transforms import is_random
from oodprompt.features import views
from oodprompt.features.cache import FeatureCache
from oodprompt.features.given import check_given
from oodprompt.log import logger, progress
from oodprompt.methods.attributes import prompt_features
from oodprompt.methods.contracts import Alignment, PromptLearner
from oodprompt.methods.splits import Split

_CAPTIONS_AT_ONCE = 1000


class Encoder:
    """Batches of every split, their alignments, and image features that are computed once.

    ``clip`` is the frozen backbone and ``learner`` the run's prompt learner, both on ``device``; ``precision`` is that
    of the towers (fp32, bf16, or fp16 for amp and fp16). ``show_progress``: whether this process shows progress bars.
    Features are normalised and in fp32. Learners given to a method must be of the run's kind.
    """

    keeps_features_of_learner = True  # whether image features of the learner may be kept

    def __init__(
        self,
        cfg: CfgNode,
        clip: CLIP,
        data: DataManager,
        learner: PromptLearner,
        device: torch.device,
        precision: str,
        show_progress: bool = True,
    ) -> None:
        self.cfg, self.clip, self.data, self.learner = cfg, clip, data, learner
        self.device, self.precision, self.show_progress = device, precision, show_progress
        self.has_pixels = data.dataset.has_pixels
        if not self.has_pixels:
            check_given(data.dataset, clip, learner, cfg)
        self.cache = FeatureCache(cfg, clip, precision, device)
        self._learner_cache = self.cache if learner.encodes_as_clip else None
        self._kept: dict[str, views.FeatureLoader] = {}
        self._frozen: dict[str, Tensor] = {}
        self.views, self.keeps_evaluation = 0, False
        if self.keeps_features_of_learner:
            if self.has_pixels:
                self.views = views.views_to_cache(cfg, learner.trains_image_tower, not learner.encodes_as_clip)
                self.keeps_evaluation = cfg.DATALOADER.FEATURE_CACHE != "off" and not learner.trains_image_tower
                self._cache_images()
            else:
                self.views, self.keeps_evaluation = 1, True

    def _cache_images(self) -> None:
        """Have loaders keep images themselves where their features are not kept."""
        if not self.views and not is_random(self.cfg):
            self.data.train_loader_x.cache_images()
        for loader in (self.data.val_loader, self.data.test_loader):
            if loader is not None and not self.keeps_evaluation:
                loader.cache_images()

    @contextlib.contextmanager
    def lasting_workers(self) -> Iterator[None]:
        """``Loader.lasting_workers`` where images are read epoch after epoch: as their features are not kept."""
        with contextlib.ExitStack() as stack:
            for loader, is_kept in (
                (self.data.train_loader_x, self.views),
                (self.data.val_loader, self.keeps_evaluation),
            ):
                if loader is not None and not is_kept:
                    stack.enter_context(loader.lasting_workers())
            yield

    # --- batches -----------------------------------------------------------------------------------------------

    def data_of(self, split: str) -> Images:
        """The images of ``train``, ``val`` or ``test``."""
        dataset = self.data.dataset
        return {"train": dataset.train_x, "val": dataset.val, "test": dataset.test}[split]

    def split(self, name: str) -> Split:
        """Labels, attributes and frozen features of a split."""
        data = self.data_of(name)
        label, attribute = (
            torch.tensor(column, dtype=torch.long, device=self.device) for column in (data.label, data.attribute)
        )
        return Split(name, label, attribute, lambda: self.frozen_features_of(name), lambda: list(data.impaths))

    def batches(self, split: str) -> Any:
        """Batches of a split, of kept features where the learner allows; None when the split is empty."""
        data = self.data
        images = {"train": data.train_loader_x, "val": data.val_loader, "test": data.test_loader}[split]
        if images is None or not (self.views if split == "train" else self.keeps_evaluation):
            return images
        if split not in self._kept:
            self.learner.eval()
            source = images.dataset.data_source
            kept = views.given_view(source, self.device, self.cfg.DATALOADER.CACHE_MEMORY_MIB)
            if kept is None and split == "train":
                kept = views.train_views(
                    data, self.encode_image, self.views, self.show_progress, cache=self._learner_cache
                )
            elif kept is None:
                kept = views.evaluation_view(
                    split, images, self.encode_image, self.show_progress, cache=self._learner_cache
                )
            self._kept[split] = views.FeatureLoader(kept, source, images.batches, self.device)
        return self._kept[split]

    def batches_in_order(self, split: str) -> Any:
        """Batches of every image of a split, without random transforms; of kept features where there are some."""
        if split != "train":
            return self.batches(split)
        images = self.data_of("train")
        if self.learner.encodes_as_clip and (self.cfg.DATALOADER.FEATURE_CACHE != "off" or not self.has_pixels):
            batches = EpochBatches(self.cfg, images, False, self.data.rank, self.data.num_processes)
            return views.FeatureLoader(self.frozen_features_of("train")[None], images, batches, self.device)
        return self.data.loader(images)

    # --- image features ----------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Mixed precision for the towers; losses are computed in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)

    def encode_image(self, images: Tensor, learner: PromptLearner | None = None) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, d] of ``learner``, or of the run's own."""
        with self.autocast():
            z = (learner or self.learner).encode_image(_at_least_one(images).to(self.device, non_blocking=True)).float()
        return z if len(images) else z[:0]

    @torch.no_grad()
    def encode_frozen(self, images: Tensor) -> Tensor:
        """Images [B, 3, R, R] -> image features [B, d] of CLIP as it was released."""
        with self.autocast():
            z = self.clip.encode_image(_at_least_one(images).to(self.device, non_blocking=True))
        return F.normalize(z.float(), dim=-1)[: len(images)]

    @torch.no_grad()
    def frozen_features_of(self, split: str) -> Tensor:
        """Features [N, d] of a split's images from CLIP as it was released.

        They are of the test transform; of the training transform for training images where nothing in it is random.
        """
        if split not in self._frozen:
            own = (
                not self.has_pixels
                or self.learner.encodes_as_clip
                and (self.views == 1 and self.keeps_frozen_features if split == "train" else self.keeps_evaluation)
            )
            if own:
                values = self.batches(split).features
            elif split == "train":
                values = views.train_views(self.data, self.encode_frozen, 1, self.show_progress, self.cache)
            else:
                images = {"val": self.data.val_loader, "test": self.data.test_loader}[split]
                assert images is not None, "a split whose features are asked for has images"
                values = views.evaluation_view(split, images, self.encode_frozen, self.show_progress, self.cache)
            self._frozen[split] = views.whole(values[0], self.device)
        return self._frozen[split]

    @property
    def keeps_frozen_features(self) -> bool:
        """Whether frozen features are computed once, because every epoch sees the same view of an image."""
        return not is_random(self.cfg) and self.cfg.DATALOADER.FEATURE_CACHE != "off"

    def _frozen_features(self, batch: Batch, z: Tensor) -> Tensor:
        """Features [B, d] of the batch from CLIP as it was released; ``z`` are the learner's."""
        if self.learner.encodes_as_clip:
            return z
        if self.keeps_frozen_features:
            return views.rows_of(self.frozen_features_of("train"), batch["index"], self.device)
        return self.encode_frozen(batch["img"])

    @cached_property
    @torch.no_grad()
    def caption_features(self) -> Tensor:
        """Text features [N, d] of the training images' captions; of the template where an image has none.

        Captions that are too long for the text encoder are cut, which a line says.
        """
        self.note_long_captions()
        names, template = self.learner.classnames, self.data.dataset.template
        captions = [d.caption or template.replace("{}", names[d.label]) for d in self.data_of("train")]
        different = list(dict.fromkeys(captions))
        parts = [different[i : i + _CAPTIONS_AT_ONCE] for i in range(0, len(different), _CAPTIONS_AT_ONCE)]
        features = torch.cat([prompt_features(self.clip, part, truncate=True) for part in parts]).float()
        place = {caption: i for i, caption in enumerate(different)}
        return features[[place[caption] for caption in captions]]

    def note_long_captions(self) -> None:
        """Say how many training images have captions that are longer than the text encoder takes, if any."""
        data, length = self.data_of("train"), self.clip.shape.context_length
        if data.captions is None:
            return
        images = Counter(datum.caption for datum in data if datum.caption)
        long = sum(number for caption, number in images.items() if self.clip.tokenizer.is_too_long(caption))
        if long:
            logger.info(
                f"Note: {long:,} of {images.total():,} captions have more than the {length} tokens that the text encoder "
                "takes; their ends are cut, as in CLIP's own training"
            )

    # --- alignments --------------------------------------------------------------------------------------------

    def align(self, batch: Batch, learner: PromptLearner | None = None) -> Alignment:
        """The alignment of a batch of images or of kept image features, by ``learner`` or the run's own."""
        learner = learner or self.learner
        z = batch["image_features"] if "image_features" in batch else self.encode_image(batch["img"], learner)
        with self.autocast():
            alignment = learner(_at_least_one(z))
        frozen = captions = None
        if learner.needs_frozen_features and learner.training:
            frozen = self._frozen_features(batch, z)
        if learner.needs_captions and learner.training:
            captions = self.caption_features[to_device(batch["index"], self.device)]
        image, text, scale = alignment.image_features, alignment.text_features, alignment.logit_scale
        if not len(z):
            image, text = image[:0], text[:0] if text.ndim == 3 else text
        return Alignment(image.float(), text.float(), scale.float(), frozen, captions)

    @torch.no_grad()
    def outputs(
        self, split: str, learner: PromptLearner, predict: Callable[[Alignment], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Image features [N, d] and ``predict``'s logits [N, C] of every image of a split, in its order, not augmented.

        Models must be in evaluation mode (``evaluating``).
        """
        features, logits, index = [], [], []
        for batch in self.batches_in_order(split):
            alignment = self.align(batch, learner)
            index.append(whole_index(batch))
            z, l = gather_together([alignment.image_features, predict(alignment)], len(index[-1]))
            features.append(z)
            logits.append(l)
        order = torch.cat(index).argsort().to(self.device)
        return torch.cat(features)[order], torch.cat(logits)[order]

    @torch.no_grad()
    def probabilities(self, paths: Sequence[str | Path], predict: Callable[[Alignment], Tensor]) -> Tensor:
        """softmax of ``predict``'s logits, [N, C] on the CPU, for images that are in no split, by the test transform.

        ``UserError`` for the first image that cannot be read.
        """
        return torch.cat([part for _, part, _ in self.probabilities_by_batch(paths, predict)])

    @torch.no_grad()
    def probabilities_by_batch(
        self, paths: Sequence[str | Path], predict: Callable[[Alignment], Tensor], skip_unreadable: bool = False
    ) -> Iterator[tuple[list[int], Tensor, dict[int, str]]]:
        """As ``probabilities``, batch by batch: places in ``paths``, their probabilities, and what ails unreadable images.

        With ``skip_unreadable`` the last is by place in ``paths``, and the first two are of the other images.
        """
        batches = self.data.loader([Datum(str(path)) for path in paths], skip_unreadable=skip_unreadable)
        for batch in progress.over(batches, "Images", "batch", show=self.show_progress):
            if len(batch["index"]):
                probabilities = predict(self.align(batch)).softmax(dim=1).cpu()
            else:
                probabilities = torch.empty(0, len(self.learner.classnames))
            yield batch["index"].tolist(), probabilities, batch.get("unreadable", {})


def _at_least_one(rows: Tensor) -> Tensor:
    """``rows`` [B, ...], or one row of ones in place of none, whose results are cut off again.

    A process may get no image of a small last batch, and not every kernel of a GPU takes an empty one. Parameters get
    gradients all the same, zeros, as in the other processes.
    """
    return rows if len(rows) else torch.cat([rows, rows.new_ones(1, *rows.shape[1:])])


def gathered(alignment: Alignment, batch: Batch) -> Alignment:
    """The alignment of the batch of all processes, with gradients; ``batch`` is the own, from which the alignment is."""
    by_image = ["image_features", "frozen_image_features", "caption_features"]
    if alignment.text_features.ndim == 3:
        by_image.append("text_features")
    own = {name: value for name in by_image if (value := getattr(alignment, name)) is not None}
    return replace(alignment, **dict(zip(own, gather_together([*own.values()], len(whole_index(batch))), strict=True)))


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """``modules`` in evaluation mode; afterwards as before."""
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.train(mode)
