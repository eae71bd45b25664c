"""GroupCoOp: a learned prompt for every class and group, so that a class has several classifiers, one per group.

With contexts [C A, M, e] and t_{c,a} = l2norm(text_encoder([V_{c,a}]_1 ... [V_{c,a}]_M [CLASS_c] .)), z the base's image
feature, s = exp(logit_scale) and groups g = (y, a) numbered y A + a, as TRAINER.GROUPS says:

    l_{c,a}  = s <z, t_{c,a}>                   p(c, a | x) = softmax over all C A groups of l
    L        = mean_i w_{g_i} (-log p(y_i, a_i | x_i)),          w_g = N / (G N_g), G the groups that have images
    predict  logsumexp_a l_{c,a}, so that softmax_c gives sum_a p(c, a | x); or max_a l_{c,a}

The engine adds the cross-entropy of the prediction, so the loss of a sample here is -log p(y, a | x) less that; where the
prediction sums over groups it is -log p(a | y, x). Either way the total is L. Groups are not needed for a prediction.
Where a source of groups says only how many values a class may have, the groups without training images take no part.

Source: Kim, Oh, Kwak, "GroupCoOp: Group-robust Fine-tuning via Group Prompt Learning", arXiv 2509.23781. That each
group of a class has a learned prompt, that these act as several classifiers of the class, and that groups may be
pseudo-labelled is the paper's (it also clusters for that, which is not done here); what the sources at hand leave open
is a key below, marked [open].
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from oodprompt.config.keys import Key, declare
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.log import logger
from oodprompt.methods.contracts import Alignment, Context, Contribution, Debiaser, Step
from oodprompt.methods.heads import Head
from oodprompt.methods.prompts import INIT_STD, NO_CONTEXT, ContextPrompts, given_words, initial_context, words_or_flag

declare(
    "TRAINER.GROUPCOOP",
    {
        "N_CTX": Key(
            16, "Number M of context vectors of each prompt (without CTX_INIT). [open]", at_least=1, error=NO_CONTEXT
        ),
        "CTX_INIT": Key(
            "a photo of a",
            "Words that all prompts start from; empty or False: random, N(0, 0.02^2). [open]",
            parse=words_or_flag,
        ),
        "NOISE": Key(
            0.02,
            "Standard deviation of noise on the words, so that the prompts of a class differ from the start. [open]",
            at_least=0,
            error="{key}: {value} is no standard deviation; give 0 or more",
        ),
        "LR": Key(0.002, "Learning rate of the prompts. [open]", at_least=0),
        "AGGREGATE": Key(
            "sum",
            "Class logits from group logits: sum (of the probabilities of a class's groups) or max. [open]",
            choices=("sum", "max"),
        ),
        "BALANCE": (True, "Every group has the same share in the loss, w_g = N / (G N_g); else w_g = 1. [open]"),
    },
)


class GroupPrompts(Debiaser):
    """The contexts ``ctx`` [C A, M, e]; they take the place of the base's text features.

    Raises ``UserError`` where the groups cannot be known (no names of attribute values for TRAINER.GROUPS pseudo, no
    attribute labels for true).
    """

    model_name = "groupcoop"
    predicts = True
    not_loaded = ("token_prefix", "token_suffix")
    present: Tensor | None  # [C A], which groups have training images; None: as all count

    @classmethod
    def default_base(cls, cfg: CfgNode) -> str:
        return "ZeroshotCLIP"

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.keys = keys = cfg.TRAINER.GROUPCOOP
        self.group_correction = "size" if keys.BALANCE else ""
        self.context = context
        self.A = context.attributes.num_groups() // len(context.data.classnames)
        names = [name for name in context.data.classnames for _ in range(self.A)]
        words = given_words(keys, "TRAINER.GROUPCOOP")
        n_ctx = len(words.split()) if words else keys.N_CTX
        ahead, start = initial_context(context.clip, "TRAINER.GROUPCOOP.N_CTX", n_ctx, words)
        noise = torch.randn(len(names), *start.shape)
        ctx = start.cpu() + keys.NOISE * noise if words else INIT_STD * noise
        self.prompts = ContextPrompts(self, context.clip, names, ahead, ctx)
        fewer = context.attributes.may_be_fewer
        self.register_buffer("present", torch.ones(len(names), dtype=torch.bool) if fewer else None)
        self._latest: tuple[Alignment | None, Tensor | None] = None, None
        logger.info(f'Initial context: "{ahead}", {n_ctx} tokens, one for each of {len(names)} groups')

    @classmethod
    def learning_rate(cls, cfg: CfgNode) -> float:
        return cfg.TRAINER.GROUPCOOP.LR

    def before_train(self) -> None:
        groups = self.context.attributes.groups(self.context.data.train)
        self.g, N_g = groups.index, groups.count
        present = N_g > 0
        balanced = N_g.sum() / (present.sum() * N_g.clamp(min=1))
        self.w = balanced if self.keys.BALANCE else torch.ones_like(balanced)  # [G]
        if self.present is not None:
            by_class = present.unflatten(0, (-1, self.A))
            self.present.copy_((by_class | ~by_class.any(dim=1, keepdim=True)).flatten())

    def group_logits(self, alignment: Alignment) -> Tensor:
        """l, [B, C, A]."""
        with self.context.autocast():
            text = self.prompts.text_features().float()  # [C A, d]
        l = alignment.logit_scale * alignment.image_features @ text.T
        return (l if self.present is None else l + self._bias(self.present)).unflatten(1, (-1, self.A))

    @staticmethod
    def _bias(present: Tensor) -> Tensor:
        """What takes groups that are not ``present`` out of the logits, [C A]; finite, as exports want it."""
        return torch.where(present, 0.0, -1e4)

    def predict(self, alignment: Alignment) -> Tensor:
        l = self.group_logits(alignment)
        self._latest = alignment, l  # the loss of this alignment needs no second pass through the text tower
        return l.logsumexp(dim=2) if self.keys.AGGREGATE == "sum" else l.amax(dim=2)

    def head(self, head: Head) -> Head:
        with self.context.autocast():
            text = self.prompts.text_features().float()
        bias = None if self.present is None else self._bias(self.present)
        return replace(
            head, class_vectors=text, text_map=None, bias=bias, members=self.A, aggregate=self.keys.AGGREGATE
        )

    def contribute(self, step: Step) -> Contribution:
        alignment, l = self._latest
        self._latest = None, None
        if l is None or alignment is not step.alignment:
            l = self.group_logits(step.alignment)
        g = self.g[step.index]
        L_g = F.cross_entropy(l.flatten(1), g, reduction="none")
        text = step.alignment.text_features
        return Contribution(
            per_sample_loss=L_g - F.cross_entropy(step.logits, step.label, reduction="none"),
            sample_weights=self.w[g],
            # The base's own prompts take no part: their gradient is 0, but there is one, as learners and scalers expect.
            penalty=0 * text.sum() if text.requires_grad else None,
            log={"L_g": L_g.mean()},
        )


@TRAINER_REGISTRY.register()
class GroupCoOp(PromptTrainer):
    """One learned prompt per class and group, several classifiers for each class (Kim et al. 2025)."""

    debiaser_class = GroupPrompts
