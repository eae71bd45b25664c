"""Class names that a small CLIP has never read: embeddings for their words, so that its frozen text tower tells them apart."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from oodprompt.backbones import CLIP

_STEPS, _LR, _TEMPERATURE = 60, 0.01, 0.1


def teach_words(clip: CLIP, classnames: Sequence[str], templates: Sequence[str], seed: int = 0) -> list[int]:
    """Give the unknown tokens of ``classnames`` embeddings of their own, in place; returns these tokens.

    The embedded CLIP has one embedding for all words that its training did not use, so "two" and "nine" are the same to
    it. Here their embeddings start at random, as long as those of known words, and move by Adam so that in every
    template the text features t of the classes repel one another: they minimise log sum_{c != k} exp(<t_c, t_k> / 0.1).
    Nothing else changes; nothing is learned of what the words mean, which is left to the image tower. A CLIP that
    knows all tokens is left as it is.
    """
    table = clip.token_embedding.weight
    rows, count = torch.unique(table.detach(), dim=0, return_counts=True)
    if len(rows) == len(table):
        return []
    shared = rows[count.argmax()]
    named = {int(i) for name in classnames for i in clip.tokenizer([name])[0] if 0 < int(i) < clip.shape.vocab_size - 2}
    unknown = sorted(i for i in named if torch.equal(table[i], shared))
    if not unknown:
        return []
    known = table[(table != shared).any(dim=1)].detach()
    generator = torch.Generator().manual_seed(seed)
    own = (torch.randn(len(unknown), table.shape[1], generator=generator) * known.std().cpu()).to(table.device)
    own.requires_grad_(True)
    tokens = clip.tokenizer([t.replace("{}", n) for t in templates for n in classnames]).to(table.device)
    ends = tokens.argmax(dim=1)
    tokens, lengths = tokens[:, : int(ends.max()) + 1], tuple(ends.tolist())
    apart = ~torch.eye(len(classnames), dtype=torch.bool, device=table.device)
    optimizer = torch.optim.Adam([own], lr=_LR)
    place = (torch.tensor(unknown, device=table.device),)
    for _ in range(_STEPS):
        embedding = F.embedding(tokens, table.detach().index_put(place, own))
        t = F.normalize(clip.encode_prompts(embedding[0, :1], embedding[:, 1:], lengths), dim=-1)
        t = t.view(len(templates), len(classnames), -1)
        loss = ((t @ t.transpose(1, 2))[:, apart] / _TEMPERATURE).logsumexp(dim=1).mean()
        (own.grad,) = torch.autograd.grad(loss, [own])
        optimizer.step()
    with torch.no_grad():
        table[place] = own.detach()
    return unknown
