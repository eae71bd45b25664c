"""From the configuration to the parts of a run: precision, prompt learner, attributes, debiasers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.captures import Captures
from oodprompt.backbones.company import shared
from oodprompt.backbones.model import ModifiedResNet
from oodprompt.config.defaults import PRECISIONS
from oodprompt.config.registry import BACKBONE_REGISTRY, GROUP_SOURCE_REGISTRY
from oodprompt.data import seeding
from oodprompt.data.dataset import DatasetBase, names_are_auto
from oodprompt.discovery.region_features import RegionFeatures
from oodprompt.engine import checkpoint
from oodprompt.engine.discovery import RunDiscovery
from oodprompt.engine.first_stage import FirstStage
from oodprompt.engine.kept_groups import KeptGroups
from oodprompt.engine.loop import RunState
from oodprompt.engine.objective import Objective
from oodprompt.engine.optim import scales_losses
from oodprompt.engine.proposed_names import ProposedNames
from oodprompt.errors import UserError, nearest
from oodprompt.features.encoder import Encoder
from oodprompt.log import logger
from oodprompt.memory import memory_for
from oodprompt.methods import sources as _registers_our_sources  # noqa: F401
from oodprompt.methods.attributes import DiscoveredAttributes, DiscoveredClusters, PseudoAttributes
from oodprompt.methods.contracts import Alignment, Context, Debiaser, GroupSource, PromptLearner
from oodprompt.methods.groups import AttributeSources, SourceOfGroups
from oodprompt.methods.splits import LabelledData

# Kinds of device that compute in fp16. Torch can on the CPU too, but slowly; tests of the scaling of losses add it.
COMPUTES_IN_FP16 = ["cuda"]
_NUMBER_OF_SPLIT = {"train": 0, "val": 1, "test": 2}  # part of the seed of PSEUDO_NOISE


def precision_of(cfg: CfgNode, learner_type: type[PromptLearner], base_name: str, device: torch.device) -> str:
    """The precision of the towers: TRAINER.PREC, else the learner's own key; fp32 on the CPU where that asks for fp16."""
    own = not cfg.TRAINER.PREC
    key = f"PREC of {base_name}" if own else "TRAINER.PREC"
    choice = learner_type.precision(cfg) if own else cfg.TRAINER.PREC
    if choice not in PRECISIONS:
        raise UserError(f"{key}: unknown precision {choice!r}: {nearest(choice, PRECISIONS)}")
    if scales_losses(choice) and device.type not in COMPUTES_IN_FP16:
        logger.info(f"Precision {choice} needs a GPU; on the CPU this run computes in fp32")
        return "fp32"
    return choice


def is_channels_last(clip: CLIP, device: torch.device, precision: str) -> bool:
    """Whether the image tower's convolutions take channels last: in half precision, a GPU's matrix units do.

    A vision transformer has one convolution, for which it does not matter. On a CPU channels last is no faster (RN50 in
    fp32: 3.4 s for 8 images either way), and it rounds otherwise.
    """
    return isinstance(clip.visual, ModifiedResNet) and device.type == "cuda" and precision != "fp32"


def load_clip(cfg: CfgNode, device: torch.device, precision: str = "fp32") -> CLIP:
    """The frozen backbone on ``device``. ``UserError`` where INPUT.SIZE is not what it takes.

    ``precision`` is that of the towers, which decides how a ResNet lies in memory.
    """
    keys = cfg.MODEL.BACKBONE
    logger.info(f"Loading CLIP (backbone: {keys.PATH or keys.NAME})")
    if keys.PATH and keys.ACTIVATION == "auto" and ":" not in keys.NAME and keys.NAME not in BACKBONE_REGISTRY:
        logger.info(
            f"Note: {keys.PATH} is taken to have QuickGELU, as OpenAI's weights have; most of OpenCLIP's need "
            "MODEL.BACKBONE.ACTIVATION gelu"
        )
    which = (keys.NAME, keys.PATH, keys.ACTIVATION, device, precision, cfg.TRAIN.ACTIVATION_GIB)
    clip = shared(("backbone", *which), lambda: load_backbone(keys.NAME, keys.PATH, activation=keys.ACTIVATION))
    with memory_for(
        "while the backbone was moved to it", "Close other programs that use it, or take a smaller --backbone"
    ):
        clip = clip.to(device)
    if is_channels_last(clip, device, precision):
        clip.visual.to(memory_format=torch.channels_last)
    takes = clip.shape.image_resolution
    if tuple(cfg.INPUT.SIZE) != (takes, takes):
        raise UserError(
            f"INPUT.SIZE is {tuple(cfg.INPUT.SIZE)}, but the backbone takes {takes} x {takes} pixels: "
            f'add INPUT.SIZE "({takes}, {takes})"'
        )
    clip.activation_limit = int(cfg.TRAIN.ACTIVATION_GIB * 2**30)
    if cfg.TRAIN.COMPILE != "off" and device.type == "cuda":
        clip.captures = Captures(after={"auto": 20, "graphs": 1}[cfg.TRAIN.COMPILE])
    elif cfg.TRAIN.COMPILE == "graphs":
        logger.info("Note: TRAIN.COMPILE graphs needs a GPU; on the CPU it changes nothing")
    return clip


def check_trained_on(cfg: CfgNode, dataset: DatasetBase) -> None:
    """``UserError`` where a method that trains has no images to train on."""
    if dataset.test_only or not dataset.train_x:
        raise UserError(
            f"{cfg.DATASET.NAME} has no training images, and {cfg.TRAINER.NAME} trains: train on another data "
            "set and come back with --eval-only --model-dir OUTPUT_FOLDER, or take a method that does not (ZeroshotCLIP)"
        )


def build_learner(
    cfg: CfgNode, learner_type: type[PromptLearner], dataset: DatasetBase, clip: CLIP, base_name: str
) -> PromptLearner:
    """A prompt learner at its initial values, the same at every call; those of MODEL.INIT_WEIGHTS where it is given."""
    seeding.set_random_seed(seeding.derive_seed(cfg.SEED, seeding.INIT, 0))
    learner = learner_type(cfg, dataset.classnames, dataset.template, clip)
    if cfg.MODEL.INIT_WEIGHTS:
        path = Path(cfg.MODEL.INIT_WEIGHTS)
        if not path.is_file():
            raise UserError(f"MODEL.INIT_WEIGHTS: no file at {path}; give a checkpoint of {base_name}")
        state_dict = checkpoint.load(path)["state_dict"]
        checkpoint.check_towers(clip, state_dict, path)
        checkpoint.load_weights(learner, state_dict, path, learner.not_loaded, learner.foreign)
    return learner


@dataclass(frozen=True)
class Debiasing:
    """The objective of a run, with its debiasers in their order, and what they were given."""

    objective: Objective
    context: Context
    discovery: RunDiscovery


def build_debiasing(
    cfg: CfgNode,
    types: Sequence[type[Debiaser]],
    encoder: Encoder,
    region_features: RegionFeatures,
    state: RunState,
    *,
    build_learner: Callable[[CfgNode], PromptLearner],
    models: Callable[[], Sequence[nn.Module]],
    names: Sequence[str],
    base_name: str,
    writes: bool = True,
) -> Debiasing:
    """Debiasers at their own initial values, on the encoder's device, and the objective with them.

    ``build_learner(cfg)`` makes another learner of the run's kind; ``models()`` are the run's models. ``names`` are the
    trainers' names of the debiasers, ``base_name`` that of the learner. Only a process that ``writes`` writes files.
    """

    def predict(alignment: Alignment) -> Tensor:  # asked for when the objective is there
        return objective.predict(alignment)

    first_stage = FirstStage(cfg, encoder, build_learner, models, predict, base_name)
    discovery = RunDiscovery(
        cfg, encoder, region_features, first_stage, state, models, Path(cfg.OUTPUT_DIR), base_name, writes
    )
    source_type = GROUP_SOURCE_REGISTRY.get(cfg.TRAINER.GROUPS, "TRAINER.GROUPS")

    def source() -> SourceOfGroups:
        own: GroupSource = source_type(cfg, context)
        return KeptGroups(own, attributes.data, cfg, state, writes) if own.is_computed else own

    attributes = _attributes(cfg, encoder, discovery.find, source, writes)
    context = Context(encoder.clip, encoder.learner, attributes.data, attributes, first_stage, encoder.autocast)
    debiasers = []
    for i, debiaser_type in enumerate(types, 1):
        seeding.set_random_seed(seeding.derive_seed(cfg.SEED, seeding.INIT, i))
        debiasers.append(debiaser_type(cfg, context).to(encoder.device))
        if debiasers[-1].takes_regions:
            encoder.data.dataset.need_pixels(f"{names[i - 1]} takes regions of images")
    objective = Objective(encoder.learner, debiasers, names, base_name)
    return Debiasing(objective, context, discovery)


def _attributes(
    cfg: CfgNode,
    encoder: Encoder,
    find: Callable[[], DiscoveredClusters],
    build_source: Callable[[], SourceOfGroups],
    writes: bool,
) -> AttributeSources:
    """The attributes of a run; ``find`` runs or reads discovery when it is asked for the first time."""
    dataset = encoder.data.dataset
    propose = ProposedNames(cfg, encoder, writes).find

    def seen(find: Callable[[], Sequence[str]] | None) -> PseudoAttributes:
        return PseudoAttributes(
            encoder.clip,
            dataset.attribute_names,
            dataset.attribute_prompts,
            cfg.TRAINER.PSEUDO_NOISE,
            lambda split: np.random.default_rng(seeding.derive_seed(cfg.SEED, seeding.NOISE, _NUMBER_OF_SPLIT[split])),
            find,
        )

    pseudo = seen(propose if names_are_auto(cfg) else None)
    data = LabelledData(
        train=encoder.split("train"),
        val=encoder.split("val") if encoder.data.val_loader else None,
        classnames=encoder.learner.classnames,
        attribute_names=dataset.attribute_names,
        num_attribute_values=1 + max(int(s.attribute.max()) for s in (dataset.train_x, dataset.val, dataset.test) if s),
    )
    proposed = pseudo if names_are_auto(cfg) else seen(propose)
    return AttributeSources(cfg.TRAINER.GROUPS, data, pseudo, DiscoveredAttributes(find), build_source, proposed)
