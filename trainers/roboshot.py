"""RoboShot with given insights: image features without harmful directions and with helpful ones made longer.

An insight is a pair of prompts; its direction is the difference of their text features. With V and U orthonormal bases
of the harmful and the helpful directions, and z an image feature of any base:

    z <- l2norm(z - V V^T z)        reject what is harmful
    z <- l2norm(z + U U^T z)        boost what is helpful         predict argmax_c <z, w_c>

Nothing is trained here; where the base is trained, gradients pass through. No language model is called: the paper asks
one for insights, here HARMFUL and HELPFUL give them, and without HARMFUL the names of the attribute's values do.

Source: Adila, Shin, Cai, Sala, "Zero-Shot Robustification of Zero-Shot Models", ICLR 2024, arXiv 2309.04344. The paper
goes direction by direction through a QR basis and normalises after each; as the basis is orthonormal that ends at the
same z, which depends on nothing but the space that the directions span, so pairs may repeat or depend on each other.
Text features are normalised before they are subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import torch
import torch.nn.functional as F
from oodprompt.trainers.orth_cal import prompts_of
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.config.keys import declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.attributes import prompt_features, span
from oodprompt.methods.contracts import Alignment, Context, Debiaser
from oodprompt.methods.heads import Head

declare(
    "TRAINER.ROBOSHOT",
    {
        "HARMFUL": (
            (),
            "Harmful insights, pairs 'prompt|prompt' whose difference is removed from image features; empty: every "
            "prompt of a value of the spurious attribute against every prompt of the other values.",
        ),
        "HELPFUL": ((), "Helpful insights, pairs 'prompt|prompt' whose difference counts double; empty: none."),
    },
)


class RobustFeatures(Debiaser):
    """The bases ``V`` [d, r] of harmful and ``U`` [d, r'] of helpful directions (r' may be 0).

    Raises ``UserError`` where HARMFUL is empty and the data set names no values of the attribute, or where nothing is
    left of the image features.
    """

    model_name = "roboshot"
    predicts = True
    V: Tensor
    U: Tensor

    @classmethod
    def default_base(cls, cfg: CfgNode) -> str:
        return "ZeroshotCLIP"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        keys = cfg.TRAINER.ROBOSHOT
        harmful, helpful = (insights(keys[key], f"TRAINER.ROBOSHOT.{key}") for key in ("HARMFUL", "HELPFUL"))
        if not harmful:
            _ = context.attributes.pseudo.text  # raises where no values are named
            values = combinations(context.attributes.pseudo.prompts, 2)
            harmful = [pair for one, other in values for pair in product(one, other)]
        V = directions(context.clip, harmful)
        if V.shape[1] == len(V):
            raise UserError(
                f"TRAINER.ROBOSHOT.HARMFUL: the pairs span all {len(V)} dimensions, so that nothing is left of the image "
                "features; give fewer"
            )
        U = directions(context.clip, helpful) if helpful else V[:, :0]
        # Not in the checkpoint: they follow from CLIP and the prompts.
        self.register_buffer("V", V.float(), persistent=False)
        self.register_buffer("U", U.float(), persistent=False)

    def robust(self, z: Tensor) -> Tensor:
        """z [B, d], normalised -> without harmful directions and with helpful ones boosted, normalised."""
        z = F.normalize(z - z @ self.V @ self.V.T, dim=-1)
        return F.normalize(z + z @ self.U @ self.U.T, dim=-1)

    def predict(self, alignment: Alignment) -> Tensor:
        return alignment.compare(self.robust(alignment.image_features))

    def head(self, head: Head) -> Head:
        one = torch.eye(len(self.V), device=self.V.device)
        return head.through(one - self.V @ self.V.T).through(one + self.U @ self.U.T)

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        return {"through raw z": alignment.logits}


def insights(entries: Sequence[str], key: str) -> list[tuple[str, str]]:
    """The pairs of ``entries`` "prompt|prompt"; ``UserError`` names ``key`` for anything but two prompts that differ."""
    pairs = []
    for entry in entries:
        prompts = prompts_of(entry, key)
        if len(prompts) != 2:
            raise UserError(f"{key}: {entry!r} has {len(prompts)} prompts; a pair has two, 'prompt|prompt'")
        pairs.append((prompts[0], prompts[1]))
    return pairs


def directions(clip: CLIP, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """An orthonormal basis [d, r] of the differences of text features of ``pairs``."""
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))  # each is encoded once
    place = {prompt: i for i, prompt in enumerate(prompts)}
    z = prompt_features(clip, prompts)
    one, other = torch.tensor([[place[prompt] for prompt in pair] for pair in pairs], device=z.device).T
    return span(z[one] - z[other])


@TRAINER_REGISTRY.register()
class RoboShot(PromptTrainer):
    """Image features without harmful directions, given as prompts; no training (Adila et al. 2024)."""

    debiaser_class = RobustFeatures
