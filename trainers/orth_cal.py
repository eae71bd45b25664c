"""OrthCal: text features projected away from what the spurious attribute's prompts say; nothing is trained.

With V an orthonormal basis of the text features of all prompts that name a value of the attribute, and S the pairs of
prompts of one class that name different values, whose features should agree:

    P_0 = I - V V^T                                                                           Orth-Proj
    P   = argmin_P ||P - P_0||_F^2 + lambda / |S| sum_{(i,j) in S} ||P z_i - P z_j||^2        Orth-Cal
        = P_0 (I + lambda / |S| sum_{(i,j) in S} (z_i - z_j) (z_i - z_j)^T)^-1
    w_c <- l2norm(P w_c)

over the text features w_c of any base, [C, d] or [B, C, d]; where the base is trained, gradients pass through P. (The
class vectors of LinearProbe lose their length here.)

Source: Chuang, Jampani, Li, Torralba, Jegelka, "Debiasing Vision-Language Models via Biased Prompts", arXiv 2302.00070.
The authors write the prompts of S by hand, some without an attribute of the list; PAIRS takes such prompts, and
PAIR_TEMPLATE makes them of the names.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.attributes import prompt_features
from oodprompt.methods.contracts import Alignment, Context, Debiaser
from oodprompt.methods.heads import Head

declare(
    "TRAINER.ORTHCAL",
    {
        "CALIBRATE": (True, "P (Orth-Cal); else P_0 (Orth-Proj)."),
        "LAMBDA": Key(
            1000.0,
            "lambda: how strongly the prompts of a pair are drawn together.",
            at_least=0,
            error="{key}: {value} would drive pairs apart; give 0 or more",
        ),
        "PAIR_TEMPLATE": (
            "a photo of a {class} with {attribute}.",
            "Prompt of a class and a value of the attribute; S are the pairs of such prompts of one class.",
        ),
        "PAIRS": (
            (),
            "In place of PAIR_TEMPLATE: one entry per class, its prompts separated by '|', every two of which are a pair.",
        ),
    },
)


class ProjectedText(Debiaser):
    """The projection ``P`` [d, d], made once from CLIP's text features of the prompts.

    Raises ``UserError`` where the data set names no values of the attribute, or where nothing is left of the text.
    """

    model_name = "orthcal"
    aligns = True
    P: Tensor

    @classmethod
    def default_base(cls, cfg: CfgNode) -> str:
        return "ZeroshotCLIP"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        keys = cfg.TRAINER.ORTHCAL
        V = context.attributes.pseudo.basis
        if V.shape[1] == len(V):
            raise UserError(
                f"DATASET.ATTRIBUTE_PROMPTS: the prompts span all {len(V)} dimensions, so that nothing is left of the "
                "text features; give fewer"
            )
        P = torch.eye(len(V), dtype=V.dtype, device=V.device) - V @ V.T
        if keys.CALIBRATE:
            z, S = self._pairs(keys, context)
            i, j = torch.tensor(S, device=V.device).T
            P = calibrated(P, z[i] - z[j], keys.LAMBDA)
        # Not in the checkpoint: it follows from CLIP and the names.
        self.register_buffer("P", P.float(), persistent=False)

    def _pairs(self, keys: CfgNode, context: Context) -> tuple[Tensor, list[tuple[int, int]]]:
        """Features [n, d] of the prompts that belong to pairs, and the pairs."""
        if keys.PAIRS:
            lists = [prompts_of(entry, "TRAINER.ORTHCAL.PAIRS") for entry in keys.PAIRS]
            if len(lists) != len(context.data.classnames):
                raise UserError(
                    f"TRAINER.ORTHCAL.PAIRS has {len(lists)} entries; give one for each of the {len(context.data.classnames)} classes"
                )
        else:
            template = keys.PAIR_TEMPLATE
            if "{class}" not in template or "{attribute}" not in template:
                raise UserError(
                    f"TRAINER.ORTHCAL.PAIR_TEMPLATE: {template!r} must have {{class}} and {{attribute}} in it"
                )
            lists = [
                [template.replace("{class}", c).replace("{attribute}", a) for a in context.attributes.pseudo.names]
                for c in context.data.classnames
            ]
        S: list[tuple[int, int]] = []
        count = 0
        for prompts in lists:
            S += combinations(range(count, count + len(prompts)), 2)
            count += len(prompts)
        return prompt_features(context.clip, [prompt for prompts in lists for prompt in prompts]), S

    def align(self, alignment: Alignment) -> Alignment:
        return replace(alignment, text_features=F.normalize(alignment.text_features @ self.P.T, dim=-1))

    def head(self, head: Head) -> Head:
        return head.with_text_map(self.P)

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        return {"without projection": alignment.logits}


def calibrated(P_0: Tensor, difference: Tensor, strength: float) -> Tensor:
    """P = P_0 (I + strength / n D^T D)^-1 for the differences D [n, d] of n pairs and a symmetric P_0 [d, d]."""
    G = torch.eye(len(P_0), dtype=P_0.dtype, device=P_0.device) + strength / len(difference) * difference.T @ difference
    return torch.linalg.solve(G, P_0).T  # (G^-1 P_0)^T


def prompts_of(entry: str, key: str) -> list[str]:
    """The prompts of an entry "one|another"; ``UserError`` names ``key`` unless two or more differ."""
    prompts = [prompt.strip() for prompt in str(entry).split("|")]
    if "" in prompts or len(set(prompts)) < max(2, len(prompts)):
        raise UserError(f"{key}: {entry!r} must be two or more different prompts separated by '|'")
    return prompts


@TRAINER_REGISTRY.register()
class OrthCal(PromptTrainer):
    """Text features projected away from the attribute's prompts, calibrated; no training (Chuang et al. 2023)."""

    debiaser_class = ProjectedText
