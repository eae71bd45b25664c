"""Prompts of all classes in one row of tokens: what they share is computed once, and nothing after the end of text.

In a causal tower the hidden states of the first tokens do not depend on what follows. Where the prompts of C classes
begin with the same P tokens (start of text, shared context vectors), these are computed once, and each class computes
only its suffix (name, ".", end of text), whose queries also look at the prefix's keys and values:

    attention(q_t) = softmax([q_t K_prefix^T, q_t K_own^T] / sqrt(d)) [V_prefix; V_own],   K_own up to position t

Tokens after the end of text cannot change what is read there and are left out. Both are exact, forward and backward.

The attention is computed in one of three ways. They differ in what they cost, not in what they give:

- ``buckets``: suffixes of one length together. The fewest operations on numbers, for a CPU.
- ``row``: the whole row at once, under a mask. The fewest kernels, for a GPU; its cost grows with the square of the row.
- ``classes``: suffixes padded to one length, each with the prefix. Few kernels too, for rows that are long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.backbones.devices import queues_work

WAYS = ("buckets", "row", "classes")
# Kernels read a mask in pieces of 16 numbers; one that does not fit is copied at every call.
_ALIGNMENT = 16
# The longest row, in widths of the tower, whose tokens attend at once: its scores then cost a third of its linear layers.
_LONGEST = 2


def way_of(device: torch.device, tokens: int, width: int) -> str:
    """How a row of so many ``tokens`` attends on a device, in a tower of this width."""
    if not queues_work(device):
        return "buckets"
    return "row" if tokens <= _LONGEST * width else "classes"


@dataclass(frozen=True)
class Packing:
    """Where the tokens of C prompts stand: the P shared ones, then the suffixes, which make T tokens.

    ``buckets`` (first token, classes, length) of each run of suffixes of one length, which are side by side;
    ``suffix_index`` [T] where each suffix token stands in a padded [C, S] that is flattened; ``suffix_places`` the class
    and the column of each; ``positions`` [P + T] of the tokens in their prompts; ``ends`` [C] where the last token of each
    class stands, in the order of the row; ``class_order`` [C] the place of each class in that order. ``way`` is one of
    ``WAYS``. ``visible`` says for "row" which tokens see which, [P + T, P + T]. For "classes" it says which tokens of a
    suffix see which of the prefix and the suffix, [S, P + S].
    """

    prefix: int
    buckets: tuple[tuple[int, int, int], ...]
    suffix_index: Tensor
    suffix_places: tuple[Tensor, Tensor]
    positions: Tensor
    ends: Tensor
    class_order: Tensor
    way: str
    visible: Tensor
    _biases: dict[tuple[torch.dtype, bool], Tensor] = field(default_factory=dict, compare=False, repr=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each prompt. q, k, v [B, H, P + T, d]; q may hold the ``ends`` only, [B, H, C, d]."""
        ends_only = q.shape[2] != k.shape[2]
        if self.way == "row":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(q.dtype, ends_only))
        return (self._by_class if self.way == "classes" else self._by_length)(q, k, v, ends_only)

    def _bias(self, dtype: torch.dtype, ends_only: bool) -> Tensor:
        """``visible`` as what is added to scores, 0 and minus infinity; for "row" and ``ends_only`` the rows ``ends``."""
        key = dtype, ends_only
        if key not in self._biases:
            with torch.inference_mode(False):
                visible = self.visible[self.ends] if ends_only and self.way == "row" else self.visible
                rows, columns = visible.shape
                room = -(-columns // _ALIGNMENT) * _ALIGNMENT
                bias = torch.zeros(rows, room, dtype=dtype, device=visible.device)[:, :columns]
                self._biases[key] = bias.masked_fill_(~visible, -torch.inf)
        return self._biases[key]

    def _by_class(self, q: Tensor, k: Tensor, v: Tensor, ends_only: bool) -> Tensor:
        """Every suffix, padded to the longest, as an item of one batch, whose keys are the prefix's and its own."""
        P, B, tokens = self.prefix, k.shape[0], k.shape[2]
        ((_, classes, length),) = self.buckets

        def own(t: Tensor, each: int) -> Tensor:  # [B, H, C * each, d] -> [B * C, H, each, d]
            return t.unflatten(2, (classes, each)).transpose(1, 2).flatten(0, 1)

        def all_seen(t: Tensor) -> Tensor:  # the prefix ahead of each suffix: [B * C, H, P + S, d]
            shared, rest = t.split([P, tokens - P], dim=2)
            ahead = shared.unsqueeze(1).expand(-1, classes, -1, -1, -1)
            return torch.cat([ahead.flatten(0, 1), own(rest, length)], dim=2)

        bias = self._bias(q.dtype, ends_only)
        asking = 1 if ends_only else length
        if ends_only:
            last = (self.ends - P) % length  # the place of each class's end in its suffix
            bias = bias[last].unsqueeze(1).unsqueeze(1).repeat(B, 1, 1, 1)
        asked = q if ends_only else q[:, :, P:]
        y = F.scaled_dot_product_attention(own(asked, asking), all_seen(k), all_seen(v), attn_mask=bias)
        y = y.unflatten(0, (B, classes)).transpose(1, 2).flatten(2, 3)
        if ends_only or not P:
            return y
        first, shared_k, shared_v = (t[:, :, :P] for t in (q, k, v))
        return torch.cat([F.scaled_dot_product_attention(first, shared_k, shared_v, is_causal=True), y], dim=2)

    def _by_length(self, q: Tensor, k: Tensor, v: Tensor, ends_only: bool) -> Tensor:
        """The suffixes of each length together, without a mask between classes."""
        P = self.prefix
        prefix_k, prefix_v = k[:, :, :P], v[:, :, :P]
        outputs = []
        if P and not ends_only:
            outputs.append(F.scaled_dot_product_attention(q[:, :, :P], prefix_k, prefix_v, is_causal=True))
        scale = q.shape[-1] ** -0.5
        done = 0
        for first, classes, length in self.buckets:
            rows = slice(first, first + classes * length)
            own_k, own_v = (t[:, :, rows].unflatten(2, (classes, length)) for t in (k, v))
            asking = 1 if ends_only else length
            asked = q[:, :, done : done + classes] if ends_only else q[:, :, rows]
            done += classes
            scores = asked.unflatten(2, (classes, asking)) @ own_k.transpose(-1, -2)  # [B, H, classes, asking, length]
            if asking > 1:
                later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(later, -torch.inf)
            to_prefix = (asked @ prefix_k.transpose(-1, -2)).unflatten(2, (classes, asking))
            weights = (scale * torch.cat([to_prefix, scores], dim=-1)).softmax(dim=-1)
            y = (weights[..., P:] @ own_v).flatten(2, 3) + weights[..., :P].flatten(2, 3) @ prefix_v
            outputs.append(y)
        return torch.cat(outputs, dim=2)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept must also serve a later training step
def pack(prefix: int, lengths: tuple[int, ...], device: torch.device, way: str = "buckets") -> Packing:
    """The packing of prompts with ``prefix`` shared tokens and suffixes of ``lengths``, to attend by one of ``WAYS``."""
    classes, longest = len(lengths), max(lengths)
    order = sorted(range(classes), key=lambda i: lengths[i]) if way == "buckets" else range(classes)
    buckets: list[tuple[int, int, int]] = []
    index: list[int] = []
    positions, ends = list(range(prefix)), []
    owners = [-1] * prefix  # of each token: its class, -1 for all
    for i in order:
        length = longest if way == "classes" else lengths[i]
        first = prefix + len(index)
        if buckets and buckets[-1][2] == length:
            start, several, _ = buckets[-1]
            buckets[-1] = (start, several + 1, length)
        else:
            buckets.append((first, 1, length))
        # What fills up a suffix stands behind its end, where no other token sees it.
        index += [i * longest + min(t, lengths[i] - 1) for t in range(length)]
        positions += range(prefix, prefix + length)
        owners += [i] * length
        ends.append(first + lengths[i] - 1)
    if way == "row":  # what fills up the row sees itself, and no other token sees it
        spare = -len(positions) % _ALIGNMENT
        index, positions, owners = (
            index + [0] * spare,
            positions + [0] * spare,
            [*owners, *range(classes, classes + spare)],
        )

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    place = {class_: i for i, class_ in enumerate(order)}
    return Packing(
        prefix=prefix,
        buckets=tuple(buckets),
        suffix_index=tensor(index),
        suffix_places=(tensor([i // longest for i in index]), tensor([i % longest for i in index])),
        positions=tensor(positions),
        ends=tensor(ends),
        class_order=tensor([place[i] for i in range(classes)]),
        way=way,
        visible=_visible(way, torch.tensor(owners), torch.tensor(positions), prefix, classes, longest).to(device),
    )


def _visible(way: str, owner: Tensor, position: Tensor, prefix: int, classes: int, longest: int) -> Tensor:
    """Which tokens (row) see which (column), as ``Packing.visible`` has it; nothing for "buckets"."""
    if way == "buckets":
        return torch.empty(0, 0, dtype=torch.bool)
    if way == "classes":
        return torch.ones(longest, prefix + longest, dtype=torch.bool).tril(prefix)
    asks, answers = owner.unsqueeze(1), owner.unsqueeze(0)
    sees = (asks == answers) | ((answers == -1) & (asks < classes))
    return sees & (position.unsqueeze(0) <= position.unsqueeze(1))
