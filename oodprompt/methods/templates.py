"""Sets of prompt templates, selections of the 80 that Radford et al. 2021 evaluated ImageNet with; the words are theirs.

``PROMPTSRC_TEMPLATES``: the 60 whose mean text feature PromptSRC holds its prompts near. ``IMAGENET_SELECT``: the 7 that
do nearly as well as all 80.
"""

from __future__ import annotations

from collections.abc import Sequence

from oodprompt.errors import UserError, nearest

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

IMAGENET_SELECT: tuple[str, ...] = (
    "itap of a {}.", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip

TEMPLATE_SETS = {"imagenet_select": IMAGENET_SELECT, "imagenet_60": PROMPTSRC_TEMPLATES}


def expand_templates(entries: Sequence[str], key: str) -> list[str]:
    """The templates that ``entries`` name: names of ``TEMPLATE_SETS`` and templates with {} for the class name.

    Raises ``UserError`` that names ``key`` for anything else.
    """
    templates: list[str] = []
    for entry in map(str, entries):
        if entry not in TEMPLATE_SETS and "{}" not in entry:
            raise UserError(
                f"{key}: {entry!r} has no {{}} for the class name, nor is it the name of a set: "
                f"{nearest(entry, TEMPLATE_SETS)}"
            )
        templates += TEMPLATE_SETS.get(entry, (entry,))
    return templates
