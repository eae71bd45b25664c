"""Yaml files of upstream's form have the values that they have there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from oodprompt.config.keys import get_cfg_default, leaves, merge_file, merge_opts
from tests.helpers.upstream_files import WORDS

# Backbone, batch size, epochs, learning rate, and what one method's file has behind the part that all have.
Sections = dict[str, dict[str, Any]]
FILES: dict[str, tuple[str, int, int, float, Sections]] = {
    "CoOp": ("RN50", 32, 50, 0.002, {}),
    "CoCoOp": ("ViT-B/16", 1, 10, 0.002, {"COCOOP": {"N_CTX": 4, "CTX_INIT": WORDS, "PREC": "fp16"}}),
    "CoCoOp, random": ("ViT-B/16", 1, 10, 0.002, {"COCOOP": {"N_CTX": 8, "CTX_INIT": "", "PREC": "fp16"}}),
    "MaPLe": (
        *("ViT-B/16", 4, 5, 0.0035),
        {"MAPLE": {"N_CTX": 2, "CTX_INIT": WORDS, "PREC": "fp16", "PROMPT_DEPTH": 9}},
    ),
    "VPT": (
        *("ViT-B/16", 4, 5, 0.0025),
        {"VPT": {"N_CTX_VISION": 8, "CTX_INIT": WORDS, "PREC": "fp16", "PROMPT_DEPTH_VISION": 12}},
    ),
    "IVLP": (
        *("ViT-B/16", 4, 5, 0.0035),
        {
            "IVLP": {
                **{"N_CTX_VISION": 2, "N_CTX_TEXT": 2, "CTX_INIT": WORDS, "PREC": "fp16"},
                **{"PROMPT_DEPTH_VISION": 12, "PROMPT_DEPTH_TEXT": 12},
            }
        },
    ),
    "KgCoOp": ("ViT-B/16", 128, 100, 0.002, {"COOP": {"CTX_INIT": True}}),
    "ProGrad": ("RN50", 32, 100, 0.002, {"LOSS": {"NAME": "prograd", "T": 1.0}, "COOP": {"CTX_INIT": True}}),
    "ProGrad, random": (
        *("RN50", 32, 100, 0.002),
        {"LOSS": {"GM": False, "T": 2, "LAMBDA": 1, "ALPHA": 0}, "COOP": {"CTX_INIT": False, "ALPHA": 1.0}},
    ),
    "PromptSRC": (
        *("ViT-B/16", 4, 20, 0.0025),
        {
            "PROMPTSRC": {
                **{"N_CTX_VISION": 4, "N_CTX_TEXT": 4, "CTX_INIT": WORDS, "PREC": "fp16"},
                **{"PROMPT_DEPTH_VISION": 9, "PROMPT_DEPTH_TEXT": 9},
                **{"TEXT_LOSS_WEIGHT": 25, "IMAGE_LOSS_WEIGHT": 10, "GPA_MEAN": 15, "GPA_STD": 1},
            }
        },
    ),
}


def yaml_text(backbone: str, batch: int, epochs: int, rate: float, sections: Sections) -> str:
    text = f"""# one of upstream's files
DATALOADER:
  TRAIN_X:
    BATCH_SIZE: {batch}
  TEST:
    BATCH_SIZE: 100
  NUM_WORKERS: 8

INPUT:
  SIZE: (224, 224)
  INTERPOLATION: "bicubic"
  PIXEL_MEAN: [0.48145466, 0.4578275, 0.40821073]
  PIXEL_STD: [0.26862954, 0.26130258, 0.27577711]
  TRANSFORMS: ["random_resized_crop", "random_flip", "normalize"]

OPTIM:
  NAME: "sgd"
  LR: {rate}
  MAX_EPOCH: {epochs}\x20
  LR_SCHEDULER: "cosine"
  WARMUP_EPOCH: 1
  WARMUP_TYPE: "constant"
  WARMUP_CONS_LR: 1e-5

TRAIN:
  PRINT_FREQ: 20

MODEL:
  BACKBONE:
    NAME: "{backbone}"
"""
    for section, values in sections.items():
        lines = [f'{key}: "{value}"' if isinstance(value, str) else f"{key}: {value}" for key, value in values.items()]
        head = [f"{section}:"] if section == "LOSS" else ["TRAINER:", f"  {section}:"]
        text += "\n".join(["", *head, *("  " * len(head) + line for line in lines), ""])
    return text.rstrip()  # upstream's files have no end of line


@pytest.mark.parametrize("name", FILES)
def test_upstreams_yaml_has_its_values(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(yaml_text(*FILES[name]))
    cfg, defaults = get_cfg_default(), leaves(get_cfg_default())
    merge_file(cfg, tmp_path / "file.yaml")
    backbone, batch, epochs, rate, sections = FILES[name]
    expected = {
        **{"MODEL.BACKBONE.NAME": backbone, "DATALOADER.TRAIN_X.BATCH_SIZE": batch, "OPTIM.MAX_EPOCH": epochs},
        **{"OPTIM.LR": rate, "OPTIM.NAME": "sgd", "OPTIM.WARMUP_EPOCH": 1, "OPTIM.WARMUP_CONS_LR": 1e-5},
        **{"INPUT.SIZE": (224, 224), "INPUT.PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073]},
        **{"INPUT.TRANSFORMS": ("random_resized_crop", "random_flip", "normalize"), "TRAIN.PRINT_FREQ": 20},
        **{"INPUT.INTERPOLATION": "bicubic", "DATALOADER.NUM_WORKERS": 8, "DATALOADER.TEST.BATCH_SIZE": 100},
    }
    for section, values in sections.items():
        for key, value in values.items():
            if key == "CTX_INIT":
                value = {True: "True", False: ""}.get(value, value)
            expected[f"{'' if section == 'LOSS' else 'TRAINER.'}{section}.{key}"] = value
    for key, value in leaves(cfg).items():
        assert type(value) is type(defaults[key]), key
        if key in expected:
            assert value == expected[key], key
        elif key not in ("INPUT.PIXEL_STD", "OPTIM.LR_SCHEDULER", "OPTIM.WARMUP_TYPE"):
            assert value == defaults[key], key
    assert expected.keys() <= leaves(cfg).keys()


def test_no_words_on_the_command_line() -> None:
    cfg = get_cfg_default()
    merge_opts(cfg, ["TRAINER.COOP.CTX_INIT", "False"])
    assert cfg.TRAINER.COOP.CTX_INIT == ""
