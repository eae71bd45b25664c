"""The settings of a run that has no config file: those of CoOp's paper, and images prepared as for CLIP."""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from oodprompt.backbones.weights import BACKBONE_REGISTRY, EMBEDDED, SHAPES

# CoOp's optimiser, and pixels as CLIP was trained on them. Nothing is drawn at random, so that image features are
# computed once.
SETTINGS: dict[str, Any] = {
    "INPUT.INTERPOLATION": "bicubic",
    "INPUT.PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073],
    "INPUT.PIXEL_STD": [0.26862954, 0.26130258, 0.27577711],
    "INPUT.TRANSFORMS": ("normalize",),
    "DATALOADER.TEST.BATCH_SIZE": 100,
    "DATALOADER.NUM_WORKERS": min(4, os.cpu_count() or 1),  # of more torch warns
    "TRAINER.COOP.CTX_INIT": "a photo of a",
    "TRAINER.COOP.N_CTX": 4,
    "OPTIM.NAME": "sgd",
    "OPTIM.LR": 0.002,
    "OPTIM.LR_SCHEDULER": "cosine",
    "OPTIM.MAX_EPOCH": 50,
    "OPTIM.WARMUP_EPOCH": 1,
    "OPTIM.WARMUP_TYPE": "constant",
    "OPTIM.WARMUP_CONS_LR": 1e-5,
}
_PIXELS = ("INPUT.INTERPOLATION", "INPUT.PIXEL_MEAN", "INPUT.PIXEL_STD")


def settings_of(backbone: str, given: Collection[str] = ()) -> dict[str, Any]:
    """``SETTINGS``, and the size of images that the backbone takes, beside the keys that are ``given``.

    Backbones of other libraries and of the user's say so themselves. The words of CTX_INIT give way to a number of
    context vectors.
    """
    has_number = "TRAINER.COOP.N_CTX" in given and "TRAINER.COOP.CTX_INIT" not in given
    settings = {key: value for key, value in SETTINGS.items() if not (has_number and key == "TRAINER.COOP.CTX_INIT")}
    if ":" in backbone or backbone in BACKBONE_REGISTRY:
        return {key: value for key, value in settings.items() if key not in _PIXELS}
    shape = (EMBEDDED | SHAPES).get(backbone)
    pixels = shape.image_resolution if shape else 224
    return settings | {"INPUT.SIZE": (pixels, pixels)}
