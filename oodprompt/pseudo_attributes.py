"""What zero-shot CLIP sees of a spurious attribute whose values have names: no labels needed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.backbones import tokenize
from oodprompt.contracts import Context
from oodprompt.errors import UserError


@torch.no_grad()
def attribute_text_features(context: Context) -> Tensor:
    """t_a = l2norm(mean over the prompts of value a of l2norm(text(prompt))), [A, d].

    Raises ``UserError`` when the data set names fewer than two values.
    """
    if len(context.attribute_prompts) < 2:
        raise UserError(
            "this method needs the names of the spurious attribute, and the data set gives none: set "
            "DATASET.ATTRIBUTE_NAMES \"('water', 'land')\" and, for better prompts, DATASET.ATTRIBUTE_PROMPTS"
        )
    device = context.clip.logit_scale.device
    rows = []
    for prompts in context.attribute_prompts:
        features = F.normalize(context.clip.encode_text(tokenize(list(prompts)).to(device)).float(), dim=-1)
        rows.append(F.normalize(features.mean(dim=0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def attribute_posterior(context: Context, attribute_text: Tensor, scale: float) -> Tensor:
    """softmax_a(scale <z_i, t_a>) for every training image, [N, A], by the frozen CLIP."""
    return F.softmax(scale * context.train_features() @ attribute_text.T, dim=1)
