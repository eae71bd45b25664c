"""PromptSRC: self-regulating prompts. IVLP, held near frozen CLIP, averaged over the epochs.

    L = CE + TEXT_LOSS_WEIGHT |w - w^clip|_1 + IMAGE_LOSS_WEIGHT |z - z^clip|_1 + KL(p^clip || p) / C

with z, w the features of the prompted towers, z^clip those of the same image in frozen CLIP and w^clip the mean over
60 templates; |.|_1 is the mean over all entries. The model that is kept is the average of the prompts over epochs
e = 1 ... E with weights of a Gaussian N(GPA_MEAN, GPA_STD) at e, which sum to 1.

Source: Khattak et al., "Self-regulating Prompts: Foundational Model Adaptation without Forgetting", ICCV 2023; upstream
file PromptSRC/trainers/promptsrc.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from oodprompt.trainers.ivlp import ONLY_VISUAL, VLPromptLearner
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.defaults import precision_key
from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.contracts import Alignment
from oodprompt.methods.prompts import NO_CONTEXT, class_text_features, words_or_flag
from oodprompt.methods.templates import PROMPTSRC_TEMPLATES

declare(
    "TRAINER.PROMPTSRC",
    {
        "N_CTX_VISION": Key(4, "Number of visual prompts per depth.", at_least=0),
        "N_CTX_TEXT": Key(4, "Number of text prompts per depth.", at_least=1, error=NO_CONTEXT),
        "CTX_INIT": Key(
            "a photo of a",
            "Words to start from where N_CTX_TEXT is 4 or less; else, or empty: random.",
            parse=words_or_flag,
        ),
        "PREC": precision_key(),
        "PROMPT_DEPTH_VISION": Key(9, "Blocks of the image tower whose prompts are learned; 0: none.", at_least=0),
        "PROMPT_DEPTH_TEXT": Key(
            9, "Blocks of the text tower whose prompts are learned.", at_least=1, error=ONLY_VISUAL
        ),
        "TEXT_LOSS_WEIGHT": Key(25.0, "Weight of the distance of text features to frozen CLIP's.", at_least=0),
        "IMAGE_LOSS_WEIGHT": Key(10.0, "Weight of the distance of image features to frozen CLIP's.", at_least=0),
        "GPA_MEAN": (15.0, "Epoch at which the Gaussian of the average over epochs is centred."),
        "GPA_STD": Key(
            1.0,
            "Its standard deviation in epochs.",
            above=0,
            error="{key}: {value} is no standard deviation; give a number above 0",
        ),
    },
)


class SelfRegulatedLearner(VLPromptLearner):
    """IVLP's prompts, the fixed text features ``hand_written`` [C, d], and ``gpa``, the average of the epochs so far."""

    name = "PromptSRC"
    not_loaded = (*VLPromptLearner.not_loaded, "gpa")
    foreign = rf"{VLPromptLearner.foreign}|prompt_learner\.ZS_image_encoder\."
    needs_frozen_features = True
    hand_written: Tensor
    gpa: Tensor

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        self.keys = keys = cfg.TRAINER.PROMPTSRC
        epochs = torch.arange(1, cfg.OPTIM.MAX_EPOCH + 1, dtype=torch.float64)
        self.epoch_weights = (-0.5 * ((epochs - keys.GPA_MEAN) / keys.GPA_STD) ** 2).softmax(dim=0).tolist()
        features = class_text_features(clip, self.classnames, PROMPTSRC_TEMPLATES)
        self.register_buffer("hand_written", features, persistent=False)
        self.register_buffer("gpa", torch.zeros(sum(p.numel() for p in self.parameters())))

    def penalty(self, alignment: Alignment) -> Tensor:
        z_clip, w_clip = alignment.frozen_image_features, self.hand_written
        assert z_clip is not None, "needs_frozen_features asks for them"
        zero_shot = alignment.logit_scale * z_clip @ w_clip.T
        log_p, log_p_clip = alignment.logits.log_softmax(dim=-1), zero_shot.log_softmax(dim=-1)
        kl = (log_p_clip.exp() * (log_p_clip - log_p)).mean()  # over images and classes, as upstream
        return (
            self.keys.TEXT_LOSS_WEIGHT * F.l1_loss(alignment.text_features, w_clip)
            + self.keys.IMAGE_LOSS_WEIGHT * F.l1_loss(alignment.image_features, z_clip)
            + kl
        )

    @torch.no_grad()
    def after_epoch(self, epoch: int) -> None:
        self.gpa += self.epoch_weights[epoch] * parameters_to_vector(self.parameters())
        if epoch + 1 == len(self.epoch_weights):
            vector_to_parameters(self.gpa, self.parameters())


@TRAINER_REGISTRY.register()
class PromptSRC(PromptTrainer):
    """Independent deep prompts held near frozen CLIP and averaged over epochs (Khattak et al. 2023)."""

    learner_class = SelfRegulatedLearner
