"""CLIP in: weights -> image encoder, text encoder, tokenizer."""

from oodprompt.backbones.model import CLIP, CLIPShape
from oodprompt.backbones.tokenizer import encode, is_too_long, tokenize
from oodprompt.backbones.weights import BACKBONES, load_backbone

__all__ = ["BACKBONES", "CLIP", "CLIPShape", "encode", "is_too_long", "load_backbone", "tokenize"]
