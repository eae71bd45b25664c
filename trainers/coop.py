"""CoOp: context optimisation. The words around the class name become learned vectors.

    t_c = [SOS] [V]_1 ... [V]_M [CLASS_c] . [EOT]        p(y = c | x) = softmax_c( s <z(x), w_c> )

with z the L2-normalised image feature, w_c = l2norm(text_encoder(t_c)) and s = exp(logit_scale), all of CLIP frozen.

Source: Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022; upstream file CoOp/trainers/coop.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP, encode, tokenize
from oodprompt.contracts import Alignment, PromptLearner
from oodprompt.engine.config import declare
from oodprompt.engine.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError, nearest

declare(
    "TRAINER.COOP",
    {
        "N_CTX": (16, "Number M of context vectors (without CTX_INIT)."),
        "CSC": (False, "Class-specific contexts: M vectors for each class instead of M shared ones."),
        "CTX_INIT": ("", "Words to start from, e.g. 'a photo of a'; empty: random, N(0, 0.02^2)."),
        "PREC": ("fp16", "fp16 or amp (fp16 autocast with loss scaling; fp32 on a CPU), bf16, fp32."),
        "CLASS_TOKEN_POSITION": ("end", "Where the class name stands: end, middle or front."),
    },
)


class ContextLearner(PromptLearner):
    """Context vectors ``ctx`` [M, e] (or [C, M, e] with CSC) and the frozen embeddings around them.

    ``token_prefix`` [C, 1, e] and ``token_suffix`` [C, 76 - M, e] are in the checkpoint as upstream has them, and are
    made anew for the class names at hand.
    """

    not_loaded = ("token_prefix", "token_suffix")

    def __init__(self, cfg: CfgNode, classnames: Sequence[str], template: str, clip: CLIP) -> None:
        super().__init__(cfg, classnames, template, clip)
        keys, device = cfg.TRAINER.COOP, clip.logit_scale.device
        words = keys.CTX_INIT.replace("_", " ").strip()
        n_ctx = len(encode(words)) if words else keys.N_CTX
        if n_ctx < 1:
            raise UserError(f"TRAINER.COOP.N_CTX: {n_ctx} context vectors are not possible; give 1 or more")
        prefix = words or " ".join(["X"] * n_ctx)
        tokens = tokenize([f"{prefix} {name}." for name in self.classnames]).to(device)
        with torch.no_grad():
            embedding = clip.token_embedding(tokens)
        if words:
            context = embedding[0, 1 : 1 + n_ctx].clone()
        else:
            context = 0.02 * torch.randn(n_ctx, embedding.shape[2])
        if keys.CSC:
            count = len(self.classnames)
            context = context.repeat(count, 1, 1) if words else 0.02 * torch.randn(count, *context.shape)
        self.ctx = nn.Parameter(context.to(device))
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :])
        self.eot = tokens.argmax(dim=-1)
        self.order = self._token_order(keys.CLASS_TOKEN_POSITION, n_ctx, tokens.shape[1]).to(device)
        print(f'Initial context: "{prefix}", {n_ctx} tokens{", one per class" if keys.CSC else ""}')

    def _token_order(self, position: str, n_ctx: int, length: int) -> Tensor:
        """For every class, which token of (SOS, context, name and rest) stands at each place, [C, length]."""
        before = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}  # context vectors ahead of the name
        if position not in before:
            raise UserError(f"TRAINER.COOP.CLASS_TOKEN_POSITION: unknown place: {nearest(position, before)}")
        rows = []
        for name in self.classnames:
            context = list(range(1, 1 + n_ctx))
            name_tokens = list(range(1 + n_ctx, 1 + n_ctx + len(encode(name))))
            head = [0, *context[: before[position]], *name_tokens, *context[before[position] :]]
            rows.append(head + list(range(len(head), length)))
        return torch.tensor(rows)

    def prompts(self) -> Tensor:
        """Token embeddings of all prompts, [C, 77, e]."""
        context = self.ctx if self.ctx.ndim == 3 else self.ctx.expand(len(self.classnames), -1, -1)
        embeddings = torch.cat([self.token_prefix, context, self.token_suffix], dim=1)
        return embeddings.gather(1, self.order.unsqueeze(-1).expand_as(embeddings))

    def forward(self, image_features: Tensor) -> Alignment:
        text_features = F.normalize(self.clip.encode_embeddings(self.prompts(), self.eot).float(), dim=-1)
        return Alignment(image_features, text_features, self.clip.logit_scale.exp())

    @classmethod
    def precision(cls, cfg: CfgNode) -> str:
        return cfg.TRAINER.COOP.PREC


@TRAINER_REGISTRY.register()
class CoOp(PromptTrainer):
    """Context optimisation: learned context vectors on the text side (Zhou et al. 2022)."""

    learner_class = ContextLearner
