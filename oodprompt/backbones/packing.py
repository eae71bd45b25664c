"""Prompts of all classes in one row of tokens: what they share is computed once, and nothing after the end of text.

In a causal tower the hidden states of the first tokens do not depend on what follows. Where the prompts of C classes
begin with the same P tokens (start of text, shared context vectors), these are computed once, and each class computes
only its suffix (name, ".", end of text), whose queries also look at the prefix's keys and values:

    attention(q_t) = softmax([q_t K_prefix^T, q_t K_own^T] / sqrt(d)) [V_prefix; V_own],   K_own up to position t

Tokens after the end of text cannot change what is read there and are left out. Both are exact, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where the tokens of C prompts stand: the P shared ones, then the suffixes, those of one length side by side.

    ``buckets`` (first token, classes, length) of each run of suffixes of one length; ``suffix_index`` [T] where each
    suffix token stands in a padded [C, S] that is flattened; ``positions`` [P + T] of the tokens in their prompts;
    ``ends`` [C] where the last token of each class stands, in the order of the row; ``class_order`` [C] the place of
    each class in that order.
    """

    prefix: int
    buckets: tuple[tuple[int, int, int], ...]
    suffix_index: Tensor
    positions: Tensor
    ends: Tensor
    class_order: Tensor

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention within each prompt. q, k, v [B, H, P + T, d]; q may hold the ``ends`` only, [B, H, C, d]."""
        P = self.prefix
        ends_only = q.shape[2] != k.shape[2]
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


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # what is kept must also serve a later training step
def pack(prefix: int, lengths: tuple[int, ...], device: torch.device) -> Packing:
    """The packing of prompts with ``prefix`` shared tokens and suffixes of ``lengths``."""
    longest = max(lengths)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    buckets: list[tuple[int, int, int]] = []
    index: list[int] = []
    positions, ends = list(range(prefix)), []
    for i in order:
        length, first = lengths[i], prefix + len(index)
        if buckets and buckets[-1][2] == length:
            start, classes, _ = buckets[-1]
            buckets[-1] = (start, classes + 1, length)
        else:
            buckets.append((first, 1, length))
        index += range(i * longest, i * longest + length)
        positions += range(prefix, prefix + length)
        ends.append(first + length - 1)

    def tensor(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    place = {class_: i for i, class_ in enumerate(order)}
    return Packing(
        prefix=prefix,
        buckets=tuple(buckets),
        suffix_index=tensor(index),
        positions=tensor(positions),
        ends=tensor(ends),
        class_order=tensor([place[i] for i in range(len(lengths))]),
    )
