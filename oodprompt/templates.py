"""The 60 prompt templates whose mean text feature PromptSRC holds its prompts near.

A selection of the 80 that Radford et al. 2021 evaluated ImageNet with; the words are theirs.
"""

from __future__ import annotations

# What stands ahead of the class name, by the word between: "a bad photo of" + " a {}.", and so on.
_OF_A = (
    "a photo of", "a bad photo of", "a sculpture of", "a rendering of", "graffiti of", "a tattoo of", "a bright photo of",
    "a drawing of", "a painting of", "a cropped photo of", "a doodle of", "a low resolution photo of", "a rendition of",
    "art of", "a pixelated photo of", "a blurry photo of", "a jpeg corrupted photo of", "a sketch of", "a close-up photo of",
)  # fmt: skip
_OF_A_KIND = ("hard to see", "clean", "dirty", "large", "nice", "weird")  # "a photo of a ... {}."
_OF_THE = (
    "a low resolution photo of", "a bad photo of", "a cropped photo of", "a dark photo of", "a close-up photo of",
    "a black and white photo of", "a painting of", "a pixelated photo of", "a sculpture of", "a bright photo of",
    "a blurry photo of", "a photo of", "a good photo of", "a rendering of", "a rendition of", "a doodle of",
    "a sketch of", "itap of",
)  # fmt: skip
_OF_THE_KIND = ("hard to see", "cool", "dirty", "clean")  # "a photo of the ... {}."
_AHEAD = (
    "a photo of many", "the embroidered", "a photo of my", "the plastic", "a plastic", "a photo of one", "the origami",
    "a origami", "the toy", "a cartoon", "a embroidered",
)  # fmt: skip

PROMPTSRC_TEMPLATES: tuple[str, ...] = (
    *(f"{words} a {{}}." for words in _OF_A),
    *(f"a photo of a {kind} {{}}." for kind in _OF_A_KIND),
    *(f"{words} the {{}}." for words in _OF_THE),
    *(f"a photo of the {kind} {{}}." for kind in _OF_THE_KIND),
    *(f"{words} {{}}." for words in _AHEAD),
    "a {} in a video game.",
    "the {} in a video game.",
)
