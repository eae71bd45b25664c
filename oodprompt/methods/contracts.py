"""The two contracts that carry everything: a *prompt learner* makes an alignment, a *debiaser* adds to its objective.

Prompt learners know nothing of debiasers, debiasers nothing of which prompt learner they wrap; the engine combines
them, so any of one goes with any of the other, and debiasers stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.data.sampling import EpochOrder
from oodprompt.errors import UserError
from oodprompt.methods.groups import AttributeSources
from oodprompt.methods.heads import Head
from oodprompt.methods.splits import LabelledData, Split


@dataclass(frozen=True)
class Alignment:
    """What a prompt learner makes of a batch.

    ``image_features`` [B, d] and ``text_features`` [C, d] (or [B, C, d] when prompts depend on the image), both
    L2-normalised (but for LinearProbe, whose class vectors have a length); ``logit_scale`` is the exp of CLIP's
    parameter. ``frozen_image_features`` [B, d] are those of CLIP as released, of the same views of the images, and
    ``caption_features`` [B, d] CLIP's normalised text features of the images' captions; the engine adds them in
    training for learners that ask (``needs_frozen_features``, ``needs_captions``).
    """

    image_features: Tensor
    text_features: Tensor
    logit_scale: Tensor
    frozen_image_features: Tensor | None = None
    caption_features: Tensor | None = None

    def compare(self, image_features: Tensor) -> Tensor:
        """``logit_scale * <image, text>`` for other normalised image features [B, d] -> [B, C]."""
        if self.text_features.ndim == 2:
            return self.logit_scale * image_features @ self.text_features.T
        return self.logit_scale * (self.text_features @ image_features.unsqueeze(-1)).squeeze(-1)

    @property
    def logits(self) -> Tensor:
        """[B, C]."""
        return self.compare(self.image_features)


# What upstream's checkpoints hold of the frozen towers beside the prompts (named VPT), for ``PromptLearner.foreign``.
TOWERS = r"(image|text)_encoder\.(?!.*VPT)|logit_scale$"


class PromptLearner(nn.Module):
    """Base of prompt learners. Parameters and buffers are what its checkpoint holds; the frozen CLIP is neither.

    Attributes: ``model_name``, the folder of its checkpoints (upstream's registered name); ``not_loaded``, state-dict
    keys that are left as they are when a model is loaded for evaluation (what depends on the class names);
    ``foreign``, a pattern of the keys that upstream's checkpoints have beyond ours and that are passed over;
    ``trains_image_tower``, whether image features change during training (so that they must not be cached);
    ``needs_frozen_features`` and ``needs_captions``, whether alignments carry ``frozen_image_features`` and
    ``caption_features`` in training; ``ce_weight``, the weight of the cross-entropy in its objective; ``sections``, those
    of TRAINER that it reads beside that of its name, whose keys are then keywords of ``oodprompt.train``.
    """

    model_name = "prompt_learner"
    not_loaded: tuple[str, ...] = ()
    foreign = ""
    trains_image_tower = False
    needs_frozen_features = False
    needs_captions = False
    ce_weight = 1.0
    sections: tuple[str, ...] = ()
    clip: CLIP

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__()
        self.classnames = [name.replace("_", " ") for name in classnames]
        self.__dict__["clip"] = clip  # not registered: neither trained nor saved with the learner

    @property
    def encodes_as_clip(self) -> bool:
        """Whether ``encode_image`` is that of CLIP as it was released."""
        own = type(self)
        same = own.encode_image is PromptLearner.encode_image and own.visual_prompts is PromptLearner.visual_prompts
        return same and self.image_clip is self.clip

    @property
    def image_clip(self) -> CLIP:
        """The CLIP whose image tower is used."""
        return self.clip

    def visual_prompts(self) -> tuple[Any, ...]:
        """What goes into the image tower beside images: prompts and deep prompts, as ``CLIP.encode_image`` takes them."""
        return ()

    def encode_image(self, images: Tensor) -> Tensor:
        """Preprocessed images [B, 3, R, R] -> L2-normalised features [B, d]."""
        return F.normalize(self.image_clip.encode_image(images, *self.visual_prompts()).float(), dim=-1)

    def encode_regions(self, images: Tensor, boxes: Sequence[Tensor], how: str = "auto") -> Tensor:
        """Images and their boxes, B tensors [n_i, 4] -> L2-normalised features of the regions [sum n_i, d].

        ``how`` as in ``CLIP.region_features``.
        """
        z = self.image_clip.region_features(images, boxes, how, self.visual_prompts())
        return F.normalize(z.float(), dim=-1)

    def forward(self, image_features: Tensor) -> Alignment:
        """L2-normalised image features [B, d] -> alignment."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def penalty(self, alignment: Alignment) -> Tensor | None:
        """A scalar that the learner itself adds to the loss, or None."""
        return None

    def backward(self, loss: Tensor, alignment: Alignment, scale: Callable[[Tensor], Tensor]) -> None:
        """Gradients of ``scale(loss)``; a method that combines gradients of several losses does it here."""
        scale(loss).backward()

    def after_epoch(self, epoch: int) -> None:
        """Called after each epoch (0-based), before it is evaluated and saved."""

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        """The PREC key of this learner."""
        return "fp32"


@dataclass(frozen=True)
class StepRegions:
    """The regions of a batch: normalised ``features`` [m, d], by the learner; ``image`` [m], the row of the batch that
    each belongs to; ``index`` [m] into the regions of the training split.
    """

    features: Tensor
    image: Tensor
    index: Tensor


@dataclass
class Step:
    """One training step as a debiaser sees it, over the whole batch of all processes.

    ``alignment`` of the batch; ``logits`` [B, C] of the prediction in force (a debiaser's, else the alignment's);
    ``label`` [B]; ``attribute`` [B] true attributes (-1: unknown) for methods that may see them; ``index`` [B] into
    the training split; ``regions`` of the images where a debiaser asks for them (``takes_regions``).
    """

    alignment: Alignment
    logits: Tensor
    label: Tensor
    attribute: Tensor
    index: Tensor
    regions: StepRegions | None = None


@dataclass
class Contribution:
    """What a debiaser adds to the objective  mean(weight * (ce_weight CE + per_sample_loss)) + penalty.

    ``per_sample_loss`` [B] is added to the cross-entropy of the prediction, ``sample_weights`` [B] multiply it,
    ``penalty`` is a scalar; ``log`` holds scalars to print.
    """

    per_sample_loss: Tensor | None = None
    sample_weights: Tensor | None = None
    penalty: Tensor | None = None
    log: dict[str, Tensor] = field(default_factory=dict)


class FirstStage(Protocol):
    """What a debiaser may ask of the engine beside a step."""

    def fit(self, epochs: int, choose: Tensor | None = None) -> tuple[PromptLearner, Tensor]:
        """Another learner of the run's kind, trained by cross-entropy alone, and its logits [N, C] on the training split.

        It sees the training images ``choose`` (indices; None: all). Debiasers have no part in it.
        """

    def outputs(self, split: Split, learner: PromptLearner | None = None) -> tuple[Tensor, Tensor]:
        """Image features [N, d] and logits [N, C] of the model as it stands, in the split's order, not augmented.

        ``learner``: of this one, which ``fit`` returned.
        """

    def adopt(self, epochs: int) -> None:
        """Let the run's own learner as it stands be what ``fit(epochs)`` returns: it was trained by cross-entropy alone."""

    def forget(self) -> None:
        """Free the memory of the learners that were trained. The engine asks for it when debiasers are ready to train."""


@dataclass
class Context:
    """What a debiaser is built from, besides the configuration.

    ``data`` has the splits and the names of classes and attribute values. ``attributes`` has the sources of attributes
    and the groups that they make. ``first_stage`` trains another learner ahead, or computes outputs of a whole split.
    ``autocast()`` is the precision of the towers. ``learner`` is the prompt learner that is wrapped: a debiaser takes
    its parameters to start from, or to stay near, and nothing more.
    """

    clip: CLIP
    learner: PromptLearner
    data: LabelledData
    attributes: AttributeSources
    first_stage: FirstStage
    autocast: Callable[[], AbstractContextManager[Any]]

    @property
    def features_are_frozen(self) -> bool:
        """Whether image features stay those of CLIP as it was released."""
        return not self.learner.trains_image_tower


class GroupSource:
    """Base of sources of groups: which value of an attribute each image has. A group is a pair (class, value).

    It is built when a method asks for groups, from the configuration and the debiasers' ``Context``. ``names`` are those
    of the values, by number; a value beyond them is called by its number. ``is_computed``: the values come out of a
    training or a search, so that the engine asks once for those of all splits and keeps them in the run's folder.
    ``may_be_fewer``: ``num_values`` is the most that there may be.
    """

    names: Sequence[str] = ()
    is_computed = False
    may_be_fewer = False

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        """A source whose names depend on the data sets ``self.names`` here."""
        self.cfg, self.context = cfg, context

    def num_values(self, split: Split) -> int:
        """A, the number of values. ``UserError`` where the source cannot tell them.

        It is asked before anything is computed, so it should ask for image features only where the values follow from them.
        """
        return len(self.names)

    def of(self, split: Split) -> Tensor:
        """The value of every image of the split, [N], from 0 to A - 1, on the device of ``split.label``.

        -1 is unknown; no training image may have it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define of")


class Debiaser(nn.Module):
    """Base of debiasers. Its parameters (trained with their own rate) and buffers are in its checkpoint.

    Attributes: ``model_name``, the folder of its checkpoints; ``predicts``, whether ``predict`` replaces the learner's
    prediction; ``aligns``, whether ``align`` changes the alignment of which the prediction and all debiasers are made; ``has_own_text``, whether
    ``predict`` compares with class vectors of its own; ``takes_regions``, whether steps carry the regions of the images; ``group_correction``, what makes up
    for the sizes of groups: ``"size"`` (weights by the groups' sizes in training), ``"batch"`` (weights by their sizes
    in the batch), ``"sampler"`` (all groups are drawn equally often) or ``""`` (nothing); ``epoch_order``, None or a
    function that takes the place of the sampler. It maps (epoch, random numbers) to the indices of the training images
    of an epoch, in order; every epoch must have the same number of images; ``sections``, as those of a prompt learner.
    Of a stack one debiaser may predict, and one may have an ``epoch_order``.
    """

    model_name = "debiaser"
    predicts = False
    aligns = False
    has_own_text = False
    takes_regions = False
    group_correction = ""
    sections: tuple[str, ...] = ()
    epoch_order: EpochOrder | None = None

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__()

    @classmethod
    def default_base(cls, cfg: CfgNode) -> str:
        """What goes under it when TRAINER.BASE is empty."""
        return "CoOp"

    @classmethod
    def learning_rate(cls, cfg: CfgNode) -> float:
        """Base learning rate of the debiaser's own parameters."""
        return cfg.OPTIM.LR

    def check(self) -> None:
        """Called when training starts, ahead of any long work: refuse what cannot be."""

    def before_train(self) -> None:
        """Called once, before the first epoch (also after a resume)."""

    def before_epoch(self, epoch: int) -> None:
        """Called before each epoch (0-based)."""

    def after_epoch(self, epoch: int) -> None:
        """Called after each epoch (0-based), before it is evaluated and saved."""

    def by_group(self) -> dict[str, dict[str, float]]:
        """What is to be drawn by epoch: name of a quantity -> name of a group -> its value after the epoch."""
        return {}

    def before_step(self) -> None:
        """Called before each step's prediction; may say which parameters the step leaves alone (requires_grad)."""

    def align(self, alignment: Alignment) -> Alignment:
        """The alignment for the prediction and for the other debiasers; used when ``aligns``. Such debiasers come in order."""
        return alignment

    def predict(self, alignment: Alignment) -> Tensor:
        """Logits [B, C]; used when ``predicts``."""
        return alignment.logits

    def head(self, head: Head) -> Head:
        """``align`` and ``predict`` in tensors alone, for export: ``head``, the prediction so far, changed as they do.

        ``UserError`` where that is not possible.
        """
        if self.predicts or self.aligns:
            raise UserError(f"{self.model_name} cannot be exported: it predicts in its own way, and defines no `head`")
        return head

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        """Further logits [B, C] by name, reported beside the prediction."""
        return {}

    def contribute(self, step: Step) -> Contribution:
        """Losses, weights and penalties of one step."""
        return Contribution()
