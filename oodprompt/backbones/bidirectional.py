"""Our text tower without the causal mask: every token sees all others, those of the padding too, as in CLIPA.

Prompts then have no shared start whose activations could be kept, and padding cannot be left out.

Source: Li et al., "An Inverse Scaling Law for CLIP Training" (CLIPA), NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from oodprompt.backbones.casts import cast
from oodprompt.backbones.general import MixedCLIP
from oodprompt.backbones.model import CLIP


class BidirectionalCLIP(CLIP):
    """``CLIP`` whose text tower sees both ways. It is read at the last place, or with ``reads_end`` at the end of text."""

    shares_prefixes = False
    reads_end = False

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [n, context_length] -> [n, embed_dim], not normalised."""
        return self.encode_embedded(tokens, self.token_embedding(tokens))

    def _encode_embedded(self, tokens: Tensor, embeddings: Tensor, deep: Sequence[Tensor]) -> Tensor:
        length = tokens.shape[1]
        x = embeddings.to(self.dtype) + self.positional_embedding[:length]
        rows = None if self.reads_end else slice(length - 1, length)
        x = self.transformer(x, deep=deep, deep_at=self.tokenizer.before, rows=rows)
        if self.reads_end:
            x = x[torch.arange(len(x), device=x.device), self.tokenizer.ends(tokens)]
        else:
            x = x[:, 0]
        return self.ln_final(x) @ cast(self, "text_projection")


class BidirectionalMixedCLIP(BidirectionalCLIP, MixedCLIP):
    """The same beside a library's image tower."""
