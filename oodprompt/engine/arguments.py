"""From ``train.py``'s flags to the frozen config."""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Callable
from pathlib import Path

from yacs.config import CfgNode

from oodprompt.config import extensions
from oodprompt.config.keys import check_values, get_cfg_default, leaves, merge_file, merge_opts, set_key
from oodprompt.config.registry import BACKBONE_REGISTRY
from oodprompt.engine.trackers import check_trackers
from oodprompt.errors import UserError
from oodprompt.log import logger
from oodprompt.methods.resolve import base_of
from oodprompt.terminal import Parser, program

# flag -> key
_FLAG_KEYS = {
    "root": "DATASET.ROOT",
    "output_dir": "OUTPUT_DIR",
    "resume": "RESUME",
    "seed": "SEED",
    "source_domains": "DATASET.SOURCE_DOMAINS",
    "target_domains": "DATASET.TARGET_DOMAINS",
    "transforms": "INPUT.TRANSFORMS",
    "trainer": "TRAINER.NAME",
    "base": "TRAINER.BASE",
    "backbone": "MODEL.BACKBONE.NAME",
    "head": "MODEL.HEAD.NAME",
}


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=program("train.py", "train"),
        description="Train and evaluate prompt learners and debiasers on CLIP.",
        epilog="All keys with their defaults are in docs/config.md.",
    )
    parser.add_argument("--root", help="folder that holds the data sets (DATASET.ROOT)")
    parser.add_argument("--output-dir", help="folder of this run (OUTPUT_DIR)")
    parser.add_argument("--resume", help="folder of the run to go on with (RESUME)")
    parser.add_argument("--seed", type=int, help="seed of everything, 0 counts; negative: random (SEED)")
    parser.add_argument("--source-domains", nargs="+", metavar="NAME", help="domains to train on")
    parser.add_argument("--target-domains", nargs="+", metavar="NAME", help="domains to test on")
    parser.add_argument("--transforms", nargs="+", metavar="NAME", help="training transforms (INPUT.TRANSFORMS)")
    parser.add_argument("--config-file", help="yaml file of the method; its keys win over those of the data set's file")
    parser.add_argument(
        "--dataset-config-file",
        help="yaml file of the data set; a data set that it names wins over one that --config-file names",
    )
    parser.add_argument("--trainer", help="name of the trainer (TRAINER.NAME)")
    parser.add_argument("--base", help="prompt learner that a debiaser wraps (TRAINER.BASE)")
    extensions.add_flag(parser)
    parser.add_argument("--backbone", help="name of the CLIP (MODEL.BACKBONE.NAME)")
    parser.add_argument("--head", help="kept for Dassl's command lines (MODEL.HEAD.NAME)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the model in --model-dir")
    parser.add_argument("--model-dir", default="", help="output folder of the run to evaluate")
    parser.add_argument("--load-epoch", type=int, help="epoch to evaluate; else the best model, else the last")
    parser.add_argument("--no-train", action="store_true", help="build everything and stop: a check of config and data")
    parser.add_argument("--list", action="store_true", help="print trainers, data sets and backbones")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, e.g. OPTIM.LR 0.01")
    return parser


def setup_cfg(args: argparse.Namespace, say: Callable[[str], None] = logger.info) -> CfgNode:
    """The frozen config: defaults, data set's file, method's file, flags, KEY VALUE pairs, in this order.

    A data set that the data set's file names wins over the one of the method's file. ``say`` shows a line on what one
    file overrides of the other.
    """
    extensions.add(args.imports)
    opts = list(args.opts)
    for flag in ("source_domains", "target_domains", "transforms"):
        # `--transforms a b OPTIM.LR 0.1` gives all four words to the flag; keys are those with a dot and capitals.
        words = getattr(args, flag) or []
        for i, word in enumerate(words):
            if "." in word and word.isupper():
                setattr(args, flag, words[:i])
                opts = words[i:] + opts
                break
    cfg = get_cfg_default()
    given = _merge_files(cfg, args.dataset_config_file, args.config_file, say)
    for flag, key in _FLAG_KEYS.items():
        value = getattr(args, flag)
        if value is not None:
            set_key(cfg, key, tuple(value) if isinstance(value, list) else value, f"--{flag.replace('_', '-')}")
    merge_opts(cfg, opts)
    _take_preprocessing(cfg, {*given, *opts[::2]}, say)
    check_values(cfg)
    check_trackers(cfg)
    if cfg.SEED < 0:
        wanted = args.seed is not None or "SEED" in opts[::2]  # a random one; else the same command again shall go on
        if wanted and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("--seed is needed with several processes, which must draw the same numbers; give 0 or more")
        drawn = random.SystemRandom().randrange(1, 2**31) if wanted else 1
        seed = _seed_of_run(cfg)
        cfg.SEED = drawn if seed is None else seed
    if not cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = _output_dir(cfg, args)
    cfg.freeze()
    return cfg


def _take_preprocessing(cfg: CfgNode, given: set[str], say: Callable[[str], None]) -> None:
    """Keys of INPUT that nobody has ``given`` become what the backbone was trained on, where that is known; say which."""
    if ":" not in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        return
    from oodprompt.backbones.weights import preprocessing_of  # here: it takes PyTorch

    preprocessing = preprocessing_of(cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.PATH)
    if preprocessing is None:
        return
    keys = preprocessing.keys()
    for key, value in keys.items():
        if key not in given:
            set_key(cfg, key, value, cfg.MODEL.BACKBONE.NAME)
    values = leaves(cfg)
    others = [key for key, value in keys.items() if list(values[key]) != list(value)]
    if others:
        say(f"Note: {cfg.MODEL.BACKBONE.NAME} was trained with {', '.join(f'{k} {keys[k]}' for k in others)}")


def _merge_files(cfg: CfgNode, of_data: str | None, of_method: str | None, say: Callable[[str], None]) -> list[str]:
    """Merge the file of the data set, then that of the method, whose keys win; returns the keys that they give.

    The section DATASET is that of the data set's file where both files name a data set: the keys that this file gives
    win, and of another data set the method's file says nothing that counts here.
    """
    first = merge_file(cfg, of_data) if of_data else []
    before = leaves(cfg)
    second = merge_file(cfg, of_method) if of_method else []
    after = leaves(cfg)
    kept: list[str] = []
    if "DATASET.NAME" in first and "DATASET.NAME" in second:
        another = before["DATASET.NAME"] != after["DATASET.NAME"]
        kept = [key for key in second if key.startswith("DATASET.") and (another or key in first)]
    for key in kept:
        set_key(cfg, key, before[key], str(of_data))
    changed = [key for key in first if key in second and key not in kept]
    for winner, loser, keys, now, was in (
        (of_data, of_method, kept, before, after),
        (of_method, of_data, changed, after, before),
    ):
        if pairs := [f"{key} {now[key]!r} (was {was[key]!r})" for key in keys if now[key] != was[key]]:
            say(f"Note: {winner} overrides of {loser}: {', '.join(pairs)}")
    return [*first, *second]


def _seed_of_run(cfg: CfgNode) -> int | None:
    """The seed that an earlier, randomly seeded run drew in the folder that is being resumed."""
    file = Path(cfg.RESUME or cfg.OUTPUT_DIR or os.devnull) / "config.yaml"
    if not file.is_file():
        return None
    old = get_cfg_default()
    merge_file(old, file)
    return old.SEED


def _output_dir(cfg: CfgNode, args: argparse.Namespace) -> str:
    if cfg.RESUME:
        return cfg.RESUME
    if args.eval_only and args.model_dir:
        return str(Path(args.model_dir) / "eval")
    base = base_of(cfg)
    name = cfg.TRAINER.NAME + (f"-{base}" if base != cfg.TRAINER.NAME else "")
    name = "+".join([name, *cfg.TRAINER.STACK])
    config = Path(args.config_file).stem if args.config_file else "default"
    run = Path("output") / (cfg.DATASET.NAME or "no_dataset") / name / config / f"seed{cfg.SEED}"
    return str(run / "untrained" if args.eval_only else run)
