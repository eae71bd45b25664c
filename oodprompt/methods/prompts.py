"""What prompt learners share: context vectors among a prompt's tokens, prompt vectors of a tower, fixed prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.errors import UserError
from oodprompt.log import logger

INIT_STD = 0.02  # of random context vectors, in every method
NO_CONTEXT = "{key}: {value} context vectors are not possible; give 1 or more"


def class_text_features(clip: CLIP, classnames: Sequence[str], templates: Sequence[str]) -> Tensor:
    """l2norm of the mean over ``templates`` ("a photo of a {}.") of each class's text features; [C, d], no gradient."""
    if isinstance(templates, str):
        raise TypeError(f"templates: a list of them is wanted, [{templates!r}]")
    device = clip.logit_scale.device
    with torch.no_grad():
        features = [
            clip.encode_text(clip.tokenizer([template.replace("{}", name) for name in classnames]).to(device))
            for template in templates
        ]
    return F.normalize(torch.stack(features).float().mean(dim=0), dim=-1)


def note_equal_classes(clip: CLIP, classnames: Sequence[str]) -> None:
    """Say which classes' names are the same to ``clip``: all their tokens have the same embeddings, so no prompt differs.

    ``tiny`` has one embedding for all words that it was not trained on; other CLIPs find equal what differs in case alone.
    """
    names = [clip.tokenizer.encode(name) for name in classnames]
    known = sorted({token for tokens in names for token in tokens})
    with torch.no_grad():
        rows = clip.token_embedding(torch.tensor(known, dtype=torch.long, device=clip.logit_scale.device))
        _, same = rows.float().round(decimals=5).unique(dim=0, return_inverse=True)
    meaning = dict(zip(known, same.tolist(), strict=True))
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, tokens in zip(classnames, names, strict=True):
        alike.setdefault(tuple(meaning[token] for token in tokens), []).append(name)
    groups = [" = ".join(map(repr, some[:4])) + (" = ..." if some[4:] else "") for some in alike.values() if some[1:]]
    if groups:
        more = f" and {len(groups) - 3} more" if groups[3:] else ""
        logger.warning(
            f"Note: the text encoder sees no difference between classes: {'; '.join(groups[:3])}{more}. Prompts alone cannot "
            "tell them apart; choose other names or another backbone"
        )


def initial_context(clip: CLIP, key: str, n_ctx: int, words: str = "") -> tuple[str, Tensor]:
    """The text ahead of the class name, and context vectors [M, e] for its first M = ``n_ctx`` tokens.

    With ``words`` these are the embeddings of the words' first tokens; the words that remain stay frozen in the
    prompt. Without, N(0, 0.02^2). ``UserError`` names ``key`` when M is not possible.
    """
    if n_ctx < 1:
        raise UserError(NO_CONTEXT.format(key=key, value=n_ctx))
    if not words:
        return " ".join(["X"] * n_ctx), INIT_STD * torch.randn(n_ctx, clip.shape.text_width)
    if len(clip.tokenizer.encode(words)) < n_ctx:
        raise UserError(
            f"{key}: the {len(clip.tokenizer.encode(words))} tokens of {words!r} are fewer than {n_ctx} context vectors"
        )
    device = clip.logit_scale.device
    with torch.no_grad():
        first = clip.tokenizer.before
        return words, clip.token_embedding(clip.tokenizer([words]).to(device))[0, first : first + n_ctx].clone()


def words_or_flag(value: Any) -> Any:
    """A CTX_INIT of a file: KgCoOp's and ProGrad's say whether to start from words ("True", ""), not from which."""
    return ("True" if value else "") if isinstance(value, bool) else value


def given_words(keys: CfgNode, section: str) -> str:
    """The words of CTX_INIT; ``UserError`` for True, which says that there are words but not which."""
    if keys.CTX_INIT == "True":
        raise UserError(
            f"{section}.CTX_INIT: True means something for CoOp, CoCoOp, KgCoOp and ProGrad only; give words"
        )
    return keys.CTX_INIT.replace("_", " ").strip()


def padded_context(clip: CLIP, key: str, n_ctx: int, words: str) -> tuple[str, Tensor]:
    """As ``initial_context``, with the words in the last of ``n_ctx`` vectors and zeros ahead of them."""
    count = len(words.split())
    if n_ctx < count:
        raise UserError(f"{key}: {n_ctx} context vectors do not hold the {count} words {words!r}")
    _, context = initial_context(clip, key, count, words)
    return " ".join(["X"] * (n_ctx - count) + [words]), F.pad(context, (0, 0, n_ctx - count, 0))


def words_of_template(template: str) -> str:
    """What a template says ahead of the class name: "a photo of a {}." -> "a photo of a"; ``UserError`` if nothing."""
    words = template.split("{}")[0].strip()
    if not words:
        raise UserError(
            f"CTX_INIT True takes the words ahead of the class name, and the template {template!r} has none: give words, "
            "or another DATASET.TEMPLATE"
        )
    return words


def context_of(clip: CLIP, keys: CfgNode, section: str, template: str) -> tuple[str, Tensor]:
    """The text ahead of the class name and the initial context [M, e] that N_CTX and CTX_INIT of ``section`` ask for.

    CTX_INIT: words, all of them learned (M is their number); True: the template's words in the last of N_CTX vectors,
    zeros ahead of them; empty: N_CTX random vectors.
    """
    if keys.CTX_INIT == "True":
        return padded_context(clip, f"{section}.N_CTX", keys.N_CTX, words_of_template(template))
    words = given_words(keys, section)
    return initial_context(clip, f"{section}.N_CTX", len(words.split()) if words else keys.N_CTX, words)


class ContextPrompts:
    """Prompts "[SOS] [V]_1 ... [V]_M rest of the prefix, class name . [EOT]" around learned context vectors.

    Registers in ``holder`` the parameter ``ctx`` [M, e] (or [C, M, e]: class-specific) and, as upstream's checkpoints
    have them, the frozen embeddings around it: ``token_prefix`` [C, 1, e] and ``token_suffix`` [C, 76 - M, e].

    ``words`` is the text ahead of the class name, ``context`` the initial values of its first M tokens, ``position``
    where the class name stands among them: end, middle (behind the first M // 2) or front.
    """

    def __init__(
        self,
        holder: nn.Module,
        clip: CLIP,
        classnames: Sequence[str],
        words: str,
        context: Tensor,
        position: str = "end",
    ) -> None:
        self.holder: Any = holder  # a module whose ctx, token_prefix and token_suffix are tensors
        self.clip, device = clip, clip.logit_scale.device
        n_ctx, before = context.shape[-2], clip.tokenizer.before
        tokens = clip.tokenizer([f"{words} {name}." for name in classnames])
        with torch.no_grad():
            embedding = clip.token_embedding(tokens.to(device))
        holder.ctx = nn.Parameter(context.to(device))
        holder.register_buffer("token_prefix", embedding[:, :before])
        holder.register_buffer("token_suffix", embedding[:, before + n_ctx :].clone())
        own = [clip.tokenizer.encode(name) for name in classnames]
        order = _token_order(
            position, [len(ids) for ids in own], n_ctx, len(clip.tokenizer.encode(words)), tokens, before
        )
        if clip.shares_prefixes:
            self._share(tokens, order, context, position)
        else:
            self.tokens = clip.cut(tokens.gather(1, order)).to(device)
            self.order = order[:, : self.tokens.shape[1]].to(device)

    def _share(self, tokens: Tensor, order: Tensor, context: Tensor, position: str) -> None:
        """What the prompts have in common, and what each has of its own."""
        classes, n_ctx, device = len(tokens), context.shape[-2], self.clip.logit_scale.device
        first, behind = self.clip.tokenizer.before, self.clip.tokenizer.before + n_ctx
        # What stands at each place: a context vector (negative) or a frozen token; equal columns are shared.
        content = tokens.gather(1, order)
        own = torch.arange(classes).unsqueeze(1) * (n_ctx + 1) if context.ndim == 3 else 0
        content = torch.where((order >= first) & (order < behind), -1 - (order + own), content)
        differs = (content != content[0]).any(dim=0)
        ends = self.clip.tokenizer.ends(tokens)
        self.shared = min(int(ends.min()), int(differs.int().argmax()) if differs.any() else tokens.shape[1])
        self.lengths = tuple((ends + 1 - self.shared).tolist())
        self.prefix_order = order[0, : self.shared].to(device)
        self.suffix_order = order[:, self.shared : int(ends.max()) + 1].to(device)
        self.suffix_is_frozen = position == "end" and self.shared >= behind

    def text_features(self, ctx: Tensor | None = None, deep: Sequence[Tensor] = ()) -> Tensor:
        """L2-normalised text features [C, d]; [B, C, d] for contexts ``ctx`` [B, M, e] that depend on the image.

        ``deep`` prompts [M, e] replace the context ahead of blocks 1, 2, ....
        """
        if not self.clip.shares_prefixes:
            return self._by_prompt(ctx, deep)
        holder = self.holder
        n_ctx = holder.ctx.shape[-2]
        by_image = ctx is not None
        ctx = holder.ctx if ctx is None else ctx
        lead = ctx.shape[:1] if by_image else ()
        first = ctx[0] if ctx.ndim == 3 and not by_image else ctx
        sos, rest = (t[0].expand(*lead, -1, -1) for t in (holder.token_prefix, holder.token_suffix))
        prefix = torch.cat([sos, first, rest], dim=-2).index_select(-2, self.prefix_order)
        if self.suffix_is_frozen:
            suffix = holder.token_suffix[:, self.shared - holder.token_prefix.shape[1] - n_ctx :]
        else:
            everyone = ctx if ctx.ndim == 3 else ctx.expand(len(self.lengths), -1, -1)
            embeddings = torch.cat([holder.token_prefix, everyone, holder.token_suffix], dim=1)
            suffix = embeddings.gather(1, self.suffix_order.unsqueeze(-1).expand(-1, -1, embeddings.shape[-1]))
        return F.normalize(self.clip.encode_prompts(prefix, suffix, self.lengths, deep).float(), dim=-1)

    def _by_prompt(self, ctx: Tensor | None, deep: Sequence[Tensor]) -> Tensor:
        """As ``text_features``, for a text encoder that takes each prompt by itself."""
        holder, classes = self.holder, len(self.tokens)
        contexts = holder.ctx.expand(classes, -1, -1).unsqueeze(0) if ctx is None else ctx.unsqueeze(1)
        images = contexts.shape[0]
        parts = (holder.token_prefix, contexts, holder.token_suffix)
        embeddings = torch.cat([part.expand(images, classes, -1, -1) for part in parts], dim=2).flatten(0, 1)
        order = self.order.repeat(images, 1).unsqueeze(-1).expand(-1, -1, embeddings.shape[-1])
        features = self.clip.encode_embedded(self.tokens.repeat(images, 1), embeddings.gather(1, order), deep)
        features = F.normalize(features.float(), dim=-1)
        return features if ctx is None else features.unflatten(0, (images, classes))


def _token_order(position: str, names: Sequence[int], n_ctx: int, ahead: int, tokens: Tensor, before: int) -> Tensor:
    """For every class, which token of (special, ``ahead`` tokens ahead of the name, name and rest) stands at each place.

    ``names`` are the numbers of tokens of the classes' names, ``tokens`` [C, L] those of the prompts, of which ``before``
    are special tokens ahead. The first ``n_ctx`` of those ahead of the name are context vectors. Returns [C, L].
    """
    length = tokens.shape[1]
    if position == "end":
        return torch.arange(length).expand(len(names), -1)
    leading = {"middle": n_ctx // 2, "front": 0}[position]  # context vectors ahead of the name
    rows = []
    for number in names:
        context = list(range(before, before + ahead))
        name = list(range(before + ahead, before + ahead + number))
        head = [*range(before), *context[:leading], *name, *context[leading:]]
        rows.append(head + list(range(len(head), length)))
    return torch.tensor(rows)


class TowerPrompts(nn.Module):
    """Prompt vectors of one tower, under the names of upstream's checkpoints.

    ``VPT`` [M, width] enter beside the tokens (image tower; the text tower's are the context), and
    ``transformer.resblocks.<i>.VPT_shallow`` [M, width] replace them ahead of block i = 1 ... depth - 1.
    """

    def __init__(self, n_ctx: int, width: int, depth: int, enters: bool) -> None:
        super().__init__()
        self.depth = depth  # the number of blocks that have prompts of their own
        if enters and depth > 0:
            self.VPT = nn.Parameter(INIT_STD * torch.randn(n_ctx, width))
        self.transformer = nn.Module()
        blocks = nn.ModuleDict({str(i): nn.Module() for i in range(1, depth)})
        self.transformer.resblocks = blocks
        for block in blocks.values():
            block.VPT_shallow = nn.Parameter(INIT_STD * torch.randn(n_ctx, width))

    def deep(self) -> list[Tensor]:
        """The prompts of blocks 1, 2, ..., each [M, width]."""
        blocks: Any = self.transformer.resblocks
        return [block.VPT_shallow for block in blocks.values()]


def visual_prompts(clip: CLIP, trainer: str, n_ctx: int, depth: int) -> TowerPrompts:
    """Prompts of the image tower in its first ``depth`` blocks; ``UserError`` when ``clip`` cannot take them."""
    if depth > 0:
        need_vit(clip, trainer)
        if n_ctx < 1:
            raise UserError(f"{trainer}: {n_ctx} visual prompts are not possible; give N_CTX_VISION 1 or more")
    width = clip.shape.vision_width
    layers = clip.shape.vision_layers if isinstance(clip.shape.vision_layers, int) else 0  # a ResNet has a tuple
    return TowerPrompts(n_ctx, width, depth_within(depth, layers, f"{trainer}, image tower"), enters=True)


def _takes_none(clip: CLIP) -> str:
    return "a ResNet has none" if clip.image_tower == "a ResNet" else f"{clip.image_tower} takes none"


def need_vit(clip: CLIP, trainer: str) -> None:
    """``UserError`` when the image tower is a ResNet."""
    if not clip.takes_visual_prompts:
        raise UserError(
            f"{trainer} puts prompts among the tokens of the image tower, and {_takes_none(clip)}: choose a ViT "
            "(MODEL.BACKBONE.NAME ViT-B/16, ...), a text prompt learner (CoOp, CoCoOp, KgCoOp, ProGrad), or for IVLP and "
            "PromptSRC PROMPT_DEPTH_VISION 0"
        )


def depth_within(depth: int, layers: int, where: str) -> int:
    """``depth`` where the tower has that many blocks, else all of them (upstream leaves such prompts unused)."""
    if depth > layers:
        logger.warning(f"{where}: prompts in {depth} blocks are asked for, this CLIP has {layers}")
    return min(depth, layers)
