"""``oodprompt backbones``: which CLIPs can be named, and what prompts and regions each takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from oodprompt.backbones import open_clip_models
from oodprompt.backbones.weights import EMBEDDED, SHAPES
from oodprompt.errors import UserError
from oodprompt.reports.style import markdown_table
from oodprompt.terminal import Parser, exit_status

COLUMNS = ("name", "path", "pixels", "text prompts", "deep text prompts", "visual prompts", "regions")
_YES, _NO = "yes", "no"
_VIT, _RESNET = "tokens, crops, masked, patches", "roi, crops, patches"
_BY_BLOCKS, _BY_STAGES, _CROPS = "tokens, crops", "roi, crops", "crops"  # of image encoders that are not ours


def rows(name: str = "") -> list[tuple[str, ...]]:
    """A row of ``COLUMNS`` for each backbone whose name holds ``name``: ours, and open_clip's where it is installed."""
    found: list[tuple[str, ...]] = []
    for own, shape in (EMBEDDED | SHAPES).items():
        vit = shape.vision_patch is not None
        found.append(
            (own, "fast", str(shape.image_resolution), _YES, _YES, _YES if vit else _NO, _VIT if vit else _RESNET)
        )
    try:
        import open_clip
    except ImportError:
        return [row for row in found if name in row[0]]
    for architecture in open_clip.list_models():
        settings = open_clip.get_model_config(architecture)
        path = open_clip_models.path_of_settings(settings)
        visual, regions = _takes(settings["vision_cfg"], path)
        pixels = settings["vision_cfg"].get("image_size", 224)
        found.append((f"{open_clip_models.PREFIX}{architecture}", path, str(pixels), _YES, _YES, visual, regions))
    return [row for row in found if name in row[0]]


def _takes(image: dict[str, Any], path: str) -> tuple[str, str]:
    """Whether an image encoder of open_clip takes prompts, and its ways of regions, from its settings.

    What is built says so itself; ``scripts/maintain/architectures.py`` compares the two for all architectures.
    """
    timm = image.get("timm_model_name", "")
    if timm.startswith(("convnext", "fastvit", "swin")):  # stages of maps
        return _NO, _BY_STAGES
    if timm.startswith("vit_relpos"):  # each of its blocks has the positions of all patches
        return _NO, _CROPS
    if isinstance(image.get("layers"), list):
        return _NO, _RESNET if path == "fast" else _BY_STAGES
    if path == "fast":  # a region cannot be masked where the mean of all patches is read
        return _YES, _VIT if image.get("pool_type", "tok") == "tok" else "tokens, crops, patches"
    return _YES, _BY_BLOCKS


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt backbones", description=__doc__)
    parser.add_argument("name", nargs="?", default="", help="only backbones whose name holds this")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    args = build_parser().parse_args(argv)
    found = rows(args.name)
    if not found:
        raise UserError(f"no name of a backbone holds {args.name!r}; `oodprompt backbones` lists all")
    print(markdown_table(COLUMNS, found))
    print(
        f"\n{len(found)} backbones. hf:REPOSITORY and hf:FOLDER name models of transformers: a CLIPModel takes the fast path. "
        "Licences of weights are not listed, as OpenCLIP's package does not hold them: see the page of their repository."
    )
    if not any(row[0].startswith(open_clip_models.PREFIX) for row in found) and not args.name:
        print("OpenCLIP's are not listed, as open_clip_torch is not installed: pip install 'oodprompt[open_clip]'")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
