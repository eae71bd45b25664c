"""The part of our engine that debiasers talk to, beside a trainer of Dassl's that keeps its own loop and its own loss."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.loading import Batch, DataManager
from oodprompt.data.transforms import build_transform
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features import views as features
from oodprompt.methods.contracts import Alignment, Debiaser, PromptLearner
from oodprompt.methods.resolve import resolve_methods
from oodprompt.plugin.datasets import TheirDataset


class _Absent(UserError, AttributeError):
    """What a foreign learner has not, for those who ask with ``hasattr`` too."""


class ForeignLearner(PromptLearner):
    """Stands for a prompt learner of another repository, whose parameters stay with its own trainer."""

    encodes_as_clip = False  # its features come from its own forward pass

    def __init__(self, cfg: CfgNode, data: TheirDataset, clip: CLIP, name: str, frozen: bool) -> None:
        super().__init__(cfg, data.classnames, data.template, clip)
        self.name, self.trains_image_tower = name, not frozen

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError as error:
            raise _Absent(
                f"a debiaser asks for {attribute!r} of the prompt learner, which {self.__dict__['name']}, of another "
                "repository, has not; take another debiaser, or a base of ours with our train.py"
            ) from error

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        raise _Absent(
            f"a debiaser asks for the parameters of {self.name}, of another repository, which are not ours to move; take "
            "another debiaser, or a base of ours with our train.py"
        )


class _Loaders(DataManager):
    """Loaders over Dassl's images with our transforms, which are composed as Dassl's; for evaluation only."""

    def __init__(self, cfg: CfgNode, data: TheirDataset) -> None:
        self.cfg, self.dataset, self.rank, self.num_processes = cfg, data, 0, 1
        self.transform_train, self.transform_test = build_transform(cfg, True), build_transform(cfg, False)


class Companion(PromptTrainer):
    """Debiasers, their context and the objective, for a trainer whose model is seen through ``align``.

    ``cfg`` is a whole tree of ours; ``align(batch)`` runs the model on ``batch["img"]`` as in evaluation. ``models`` are
    those of the trainer, by name. ``debiasers`` are built as in our own runs.
    """

    def __init__(
        self,
        cfg: CfgNode,
        data: Any,
        clip: CLIP,
        align: Callable[[Batch], Alignment],
        models: OrderedDict[str, nn.Module],
        base: str,
        device: torch.device,
    ) -> None:
        self.cfg, self.device, self.base_name = cfg, torch.device(device), base
        self.clip = clip.to(self.device).eval().requires_grad_(False)
        self._align, self._models = align, models
        self.dataset = TheirDataset(cfg, data)
        self.num_classes = self.dataset.num_classes
        self.state = SimpleNamespace(is_main_process=True, process_index=0, num_processes=1)
        self.precision, self.output_dir, self.start_epoch = "fp32", Path(cfg.OUTPUT_DIR), 0
        self.dm = _Loaders(cfg, self.dataset)
        self.train_loader_x = None
        self.val_loader = self.dm.loader(self.dataset.val) if self.dataset.val else None
        self.test_loader = self.dm.loader(self.dataset.test)
        self.views, self.caches_evaluation, self.groups_by = 0, False, None
        self._cached, self._frozen, self.regions, self.region_cache = {}, {}, {}, {}
        self.feature_cache = features.FeatureCache(cfg, self.clip, self.precision, self.device, self.print)
        self.learner = ForeignLearner(cfg, self.dataset, self.clip, base, frozen=self._keeps_features())
        self._build_debiasers()
        self.attributes = {name: self.split(name).attribute for name in ("train", "val", "test")}

    def _keeps_features(self) -> bool:
        """Whether the model's image features are those of CLIP and nothing trains them, seen on one image."""
        size = tuple(self.cfg.INPUT.SIZE)
        image = torch.linspace(-1, 1, 3 * size[0] * size[1], device=self.device).view(1, 3, *size)
        with torch.enable_grad():
            seen = self._align({"img": image, "label": torch.zeros(1, dtype=torch.long, device=self.device)})
        if seen.image_features.requires_grad:
            return False
        # Upstream computes in half precision where it is not told otherwise.
        return bool((seen.image_features * self.encode_frozen(image)).sum() > 0.999)

    def _build_debiasers(self) -> None:
        """The debiasers that TRAINER.NAME and TRAINER.STACK name; ``UserError`` for what cannot be here."""
        cfg = self.cfg.clone()
        cfg.TRAINER.BASE = "CoOp"  # theirs may have a name that ours have not
        self.debiaser_types = resolve_methods(cfg)[2]
        self.debiaser_class = self.debiaser_types[0]
        context, self.debiasers = self.build_context(), []
        for i, debiaser_type in enumerate(self.debiaser_types, 1):
            seeding.set_random_seed(seeding.derive_seed(self.cfg.SEED, seeding.INIT, i))
            self.debiasers.append(debiaser_type(self.cfg, context).to(self.device))
        self.predictor = self._only_one("predicts", "replace the prediction")
        chooser = self._only_one("chooses_images", "choose the images of an epoch")
        self._refuse_balancing_twice(chooser)
        for name, debiaser in zip(self.debiaser_names, self.debiasers, strict=True):
            self._refuse(name, debiaser)

    def _refuse(self, name: str, debiaser: Debiaser) -> None:
        """``UserError`` where a debiaser needs what a trainer of Dassl's does not give."""
        if debiaser.chooses_images:
            raise UserError(
                f"{name} chooses the images of an epoch, which is Dassl's loader's to do; "
                f"use it with our train.py, or see its keys (GroupDRO: TRAINER.GROUPDRO.BALANCED False)"
            )
        if debiaser.takes_regions and self.learner.trains_image_tower:
            raise UserError(
                f"{name} needs features of regions, and {self.base_name} trains or changes the image tower in its own "
                "way; use a base that leaves it alone (CoOp, CoCoOp, KgCoOp), or our train.py"
            )

    def build_learner(self, cfg: CfgNode) -> NoReturn:
        raise UserError(
            f"{' or '.join(self.debiaser_names)} asks for {self.base_name} trained alone, which cannot be done for a base "
            "of another repository; take another debiaser, or our train.py; where it is for discovery, set "
            "DISCOVERY.FROM to a folder that scripts/discover.py wrote"
        )

    def align(self, batch: Batch, learner: PromptLearner | None = None) -> Alignment:
        return self._align(batch)

    def step(self, alignment: Alignment, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The objective of a training batch of Dassl's, and scalars to print."""
        batch = {**batch, "attribute": self.attributes["train"][batch["index"].to(self.device)]}
        regions = self.step_regions(batch) if any(d.takes_regions for d in self.debiasers) else None
        loss, summary = self.objective(alignment, batch, regions)
        return loss, {name: float(value) for name, value in summary.items()}

    def evaluators(self) -> Evaluators:
        return Evaluators(self)


class Evaluators:
    """Accuracy by group of the prediction and of what debiasers predict otherwise, beside Dassl's own metrics."""

    def __init__(self, companion: Companion) -> None:
        self.companion, self._by_name = companion, {}

    def process(self, alignment: Alignment, prediction: Tensor, label: Tensor, attribute: Tensor) -> None:
        predictions = {"": prediction}
        for debiaser in self.companion.debiasers:
            predictions.update(debiaser.other_predictions(alignment))
        for name, logits in predictions.items():
            if name not in self._by_name:
                self._by_name[name] = EVALUATOR_REGISTRY.get("Classification")(
                    self.companion.cfg, self.companion.dataset
                )
            self._by_name[name].process(logits, label, attribute)

    def metrics(self) -> dict[str, dict[str, Any]]:
        """By name of the prediction ("": the one that counts); empty when nothing was processed."""
        train = self.companion.dataset.train_x
        return {name: evaluator.evaluate(train) for name, evaluator in self._by_name.items()}


@contextlib.contextmanager
def apart(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; afterwards as if none had been drawn, so that the other trainer's stay its own."""
    python, numbers = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        seeding.set_random_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numbers)


def frozen_copy(theirs: dict[str, Tensor]) -> CLIP:
    """Our CLIP from the state dict of theirs, whatever prompts it has in it (MaPLe, IVLP, VPT, PromptSRC)."""
    return CLIP.from_state_dict({key: value for key, value in theirs.items() if "VPT" not in key})
