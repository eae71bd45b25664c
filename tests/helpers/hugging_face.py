"""What tests of models of transformers are made of: a tokenizer of a few words, and distances."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Vocabulary
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

WORDS = ["a", "photo", "of", "X", "water", "land", "bird", "cat", ".", "circle", "diamond"]


def write_tokenizer(folder: Path, pads_with_end: bool, padding_side: str = "right") -> int:
    """A word tokenizer as transformers saves one, with start and end; returns the id of the end."""
    special = ["<unk>", "<pad>", "<s>"]
    ids = {word: i for i, word in enumerate([*special, *WORDS, "</s>"])}
    vocabulary = Vocabulary(models.WordLevel(ids, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
    )
    pad = "</s>" if pads_with_end else "<pad>"
    PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        bos_token="<s>",
        eos_token="</s>",
        pad_token=pad,
        unk_token="<unk>",
        padding_side=padding_side,
    ).save_pretrained(folder)
    return ids["</s>"]


def off(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
