"""``oodprompt features``: the image features of a data set in one file, from which other runs train without the images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from oodprompt.config import extensions
from oodprompt.engine.arguments import setup_cfg
from oodprompt.errors import UserError
from oodprompt.log import logger, show_messages
from oodprompt.terminal import Parser, exit_status

DESCRIPTION = """Compute the image features of a data set by a frozen CLIP and write them to one file, with labels, splits and names.

  oodprompt features --root photos --backbone ViT-B/16 --output photos.npz DATASET.NAME Folders
  oodprompt train --trainer CoOpOOD --backbone ViT-B/16 DATASET.NAME Features DATASET.FEATURES.FILE photos.npz

Images are taken by the test transform. Without --config-file they are prepared as for CLIP. The results of runs on the file are those of runs on the images.
"""
DTYPES = ("float32", "float16")


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt features", description=DESCRIPTION)
    parser.add_argument("--output", type=Path, required=True, help="file to write, .npz or .safetensors")
    parser.add_argument("--root", help="folder that holds the data set (DATASET.ROOT)")
    parser.add_argument("--backbone", help="name of the CLIP (MODEL.BACKBONE.NAME)")
    parser.add_argument("--config-file", help="yaml file, of which MODEL, INPUT and DATALOADER count")
    parser.add_argument("--dataset-config-file", help="yaml file of the data set")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="how numbers are kept (default: float32)")
    extensions.add_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, e.g. DATASET.NAME Folders")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    show_messages()
    args = build_parser().parse_intermixed_args(argv)
    others = ("output_dir", "resume", "seed", "source_domains", "target_domains", "transforms", "base", "head")
    for name in others:  # flags of training that setup_cfg looks for
        setattr(args, name, None)
    args.trainer, args.eval_only, args.model_dir = "ZeroshotCLIP", False, ""
    if not args.config_file:
        from oodprompt.engine.settings import settings_of  # here: it takes PyTorch

        given = dict(zip(args.opts[::2], args.opts[1::2], strict=False))
        prepared = settings_of(args.backbone or given.get("MODEL.BACKBONE.NAME", ""))
        args.opts = [*(word for pair in prepared.items() for word in pair), *args.opts]
    cfg = setup_cfg(args)
    path = extract(cfg, args.output, args.dtype)
    print(f"Wrote {path} ({os.path.getsize(path):,} bytes)")


def extract(cfg: CfgNode, output: Path, dtype: str = "float32") -> Path:
    """Write the features of the data set of ``cfg`` by its backbone, in this ``dtype``; returns the file's path."""
    from oodprompt.backbones.weights import digest
    from oodprompt.data.feature_files import is_feature_file, write_features
    from oodprompt.engine.trainer import build_trainer

    if not is_feature_file(output):
        raise UserError(f"--output {output}: a file of image features ends in .npz or .safetensors")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TRAINER.NAME, cfg.TRAINER.BASE, cfg.TRAINER.STACK = "ZeroshotCLIP", "", ()
    cfg.INPUT.TRANSFORMS = tuple(name for name in cfg.INPUT.TRANSFORMS if name in ("normalize", "instance_norm"))
    cfg.freeze()
    trainer = build_trainer(cfg)
    dataset, encoder = trainer.dataset, trainer.encoder
    dataset.need_pixels("features are computed from images")
    splits = {name: encoder.data_of(name) for name in ("train", "val", "test")}
    if dataset.test_only:
        del splits["train"]  # they stand in for training images
    splits = {name: images for name, images in splits.items() if len(images)}
    columns: dict[str, list[Any]] = {"image_features": [], "split": [], "image": [], "caption": []}
    columns |= {"label": [], "attribute": [], "domain": []}
    for number, name in enumerate(("train", "val", "test")):
        if name not in splits:
            continue
        images = splits[name]
        columns["image_features"].append(encoder.frozen_features_of(name).cpu().numpy().astype(dtype))
        columns["split"].append(np.full(len(images), number, np.int8))
        columns["image"].append(np.array(list(images.impaths)))
        columns["caption"].append(np.array([datum.caption for datum in images]))
        for key in ("label", "attribute", "domain"):
            columns[key].append(getattr(images, key))
    content = {name: np.concatenate(parts) for name, parts in columns.items()}
    if not any(content["caption"].tolist()):
        del content["caption"]
    if not (content["attribute"] >= 0).any():
        del content["attribute"]
    logger.info(f"Image features of {', '.join(f'{len(images):,} {name}' for name, images in splits.items())} images")
    return write_features(
        output,
        class_names=dataset.classnames,
        attribute_names=list(dataset.attribute_names) or None,
        attribute_prompts=["|".join(prompts) for prompts in dataset.attribute_prompts] or None,
        template=dataset.template,
        backbone=cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
        backbone_digest=digest(encoder.clip.visual),
        **content,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
