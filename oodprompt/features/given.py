"""Features that come in place of images: whether this backbone made them, and whether this learner can take them."""

from __future__ import annotations

from yacs.config import CfgNode

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import digest
from oodprompt.data.dataset import DatasetBase
from oodprompt.data.transforms import is_random
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.contracts import PromptLearner
from oodprompt.methods.resolve import base_of


def check_given(dataset: DatasetBase, clip: CLIP, learner: PromptLearner, cfg: CfgNode) -> None:
    """``UserError`` for features of another backbone, or for a learner that changes how images are encoded."""
    if learner.trains_image_tower or not learner.encodes_as_clip:
        dataset.need_pixels(f"{base_of(cfg)} changes how images are encoded")
    vectors, ours = dataset.test.vectors, cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME
    assert vectors is not None, "there are features in place of images"
    name, theirs = dataset.made_by.get("backbone", ""), dataset.made_by.get("backbone_digest", "")
    by = f"the features were made by the backbone {name or 'with the digest ' + theirs[:12]}"
    if theirs and theirs != digest(clip.visual):
        if name == ours:
            raise UserError(f"{by}, with other weights than {ours} has now; give those by MODEL.BACKBONE.PATH")
        raise UserError(f"{by}, not by {ours}; give --backbone {name or 'of that name'}")
    if not theirs and name and name != ours:
        raise UserError(f"{by}, not by {ours}; give --backbone {name}, or take the name out of the file")
    if vectors.width != clip.shape.embed_dim:
        raise UserError(
            f"the features have {vectors.width} entries each, but those of {ours} have {clip.shape.embed_dim}; "
            "give the backbone that made them"
        )
    if not name and not theirs:
        logger.info(f"Note: the file does not say which backbone made its features; they are taken for those of {ours}")
    if is_random(cfg):
        logger.info("Note: INPUT.TRANSFORMS change nothing: there is one view of each image, in its features")
