"""The part of our engine that debiasers talk to, beside a trainer of Dassl's that keeps its own loop and its own loss."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.registry import EVALUATOR_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.loading import Batch, DataManager
from oodprompt.data.transforms import Transform
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.engine import assembly
from oodprompt.engine.evaluation import Evaluation
from oodprompt.engine.loop import RunState
from oodprompt.engine.objective import Objective
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.methods.contracts import Alignment, Debiaser, PromptLearner
from oodprompt.methods.resolve import resolve_methods
from oodprompt.plugin.datasets import TheirDataset


class _Absent(UserError, AttributeError):
    """What a foreign learner has not, for those who ask with ``hasattr`` too."""


class ForeignLearner(PromptLearner):
    """Stands for a prompt learner of another repository, whose parameters stay with its own trainer."""

    encodes_as_clip = False  # its features come from its own forward pass

    def __init__(self, cfg: CfgNode, data: TheirDataset, clip: CLIP, name: str) -> None:
        super().__init__(cfg, data.classnames, data.template, clip)
        self.name = name

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


class ForeignEncoder(Encoder):
    """An encoder whose alignments come from a model of another repository, by ``align_with(batch)``."""

    keeps_features_of_learner = False

    def __init__(
        self,
        cfg: CfgNode,
        clip: CLIP,
        data: DataManager,
        learner: PromptLearner,
        device: torch.device,
        align_with: Callable[[Batch], Alignment],
    ) -> None:
        super().__init__(cfg, clip, data, learner, device, "fp32")
        self._align_with = align_with

    def align(self, batch: Batch, learner: PromptLearner | None = None) -> Alignment:
        return self._align_with(batch)


class _Loaders(DataManager):
    """Loaders over Dassl's images with our transforms, which are composed as Dassl's; for evaluation only."""

    def __init__(self, cfg: CfgNode, data: TheirDataset, device: torch.device) -> None:
        self.cfg, self.dataset, self.device, self.rank, self.num_processes = cfg, data, device, 0, 1
        self.num_classes, self.lab2cname = data.num_classes, data.lab2cname
        self.transform_train, self.transform_test = Transform(cfg, is_train=True), Transform(cfg, is_train=False)
        self.train_loader_x = self.loader(data.train_x)  # in the split's order; Dassl trains with loaders of its own
        self.val_loader = self.loader(data.val) if data.val else None
        self.test_loader = self.loader(data.test)


class Companion:
    """Debiasers, their context and the objective, for a trainer whose model is seen through ``align``.

    ``cfg`` is a whole tree of ours; ``align(batch)`` runs the model on ``batch["img"]`` as in evaluation. ``models`` are
    those of the trainer, by name; ``base`` is its registered name. It owns an ``encoder`` and an ``objective``.
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
        self.cfg, self.device, self.base_name, self._models = cfg, torch.device(device), base, models
        self.clip = clip.to(self.device).eval().requires_grad_(False)
        self.dataset = TheirDataset(cfg, data)
        self.run = RunState(max_epoch=cfg.OPTIM.MAX_EPOCH)
        self.learner = ForeignLearner(cfg, self.dataset, self.clip, base)
        loaders = _Loaders(cfg, self.dataset, self.device)
        self.encoder = ForeignEncoder(cfg, self.clip, loaders, self.learner, self.device, align)
        self.learner.trains_image_tower = not self._keeps_features()
        self.region_features = RegionFeatures(cfg, self.encoder)
        self.objective = self._build_objective()
        self.debiasers = self.objective.debiasers
        for name, debiaser in zip(self.debiaser_names, self.debiasers, strict=True):
            self._refuse(name, debiaser)
        self.attributes = {name: self.encoder.split(name).attribute for name in ("train", "val", "test")}

    @property
    def debiaser_names(self) -> list[str]:
        """The trainers' names of ``debiasers``."""
        return [self.cfg.TRAINER.NAME, *self.cfg.TRAINER.STACK]

    def _keeps_features(self) -> bool:
        """Whether the model's image features are those of CLIP and nothing trains them, seen on one image."""
        size = tuple(self.cfg.INPUT.SIZE)
        image = torch.linspace(-1, 1, 3 * size[0] * size[1], device=self.device).view(1, 3, *size)
        with torch.enable_grad():
            seen = self.encoder.align({"img": image, "label": torch.zeros(1, dtype=torch.long, device=self.device)})
        if seen.image_features.requires_grad:
            return False
        # Upstream computes in half precision where it is not told otherwise.
        return bool((seen.image_features * self.encoder.encode_frozen(image)).sum() > 0.999)

    def _build_objective(self) -> Objective:
        """The objective with the debiasers that TRAINER.NAME and TRAINER.STACK name."""
        cfg = self.cfg.clone()
        cfg.TRAINER.BASE = "CoOp"  # theirs may have a name that ours have not
        types = resolve_methods(cfg)[2]
        return assembly.build_debiasing(
            self.cfg,
            types,
            self.encoder,
            self.region_features,
            self.run,
            build_learner=self._refuse_first_stage,
            models=lambda: list(self._models.values()),
            names=self.debiaser_names,
            base_name=self.base_name,
        ).objective

    def _refuse(self, name: str, debiaser: Debiaser) -> None:
        """``UserError`` where a debiaser needs what a trainer of Dassl's does not give."""
        if debiaser.epoch_order is not None:
            raise UserError(
                f"{name} chooses the images of an epoch, which is Dassl's loader's to do; "
                f"use it with our train.py, or see its keys (GroupDRO: TRAINER.GROUPDRO.BALANCED False)"
            )
        if debiaser.takes_regions and self.learner.trains_image_tower:
            raise UserError(
                f"{name} needs features of regions, and {self.base_name} trains or changes the image tower in its own "
                "way; use a base that leaves it alone (CoOp, CoCoOp, KgCoOp), or our train.py"
            )

    def _refuse_first_stage(self, cfg: CfgNode) -> NoReturn:
        raise UserError(
            f"{' or '.join(self.debiaser_names)} asks for {self.base_name} trained alone, which cannot be done for a base "
            "of another repository; take another debiaser, or our train.py; where it is for discovery, set "
            "DISCOVERY.FROM to a folder that scripts/discover.py wrote"
        )

    def step(self, alignment: Alignment, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """The objective of a training batch of Dassl's, and scalars to print."""
        batch = {**batch, "attribute": self.attributes["train"][batch["index"].to(self.device)]}
        regions = self.region_features.of_step(batch) if self.objective.takes_regions else None
        loss, scalars = self.objective(alignment, batch, regions)
        return loss, {name: float(value) for name, value in scalars.items()}

    def evaluation(self) -> Evaluation:
        """What collects the predictions of a split, for accuracy by group beside Dassl's own metrics."""

        def another() -> Any:
            return EVALUATOR_REGISTRY.get("Classification")(self.cfg, self.dataset)

        return Evaluation(another(), another)


@contextlib.contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
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
