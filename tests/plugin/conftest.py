"""The plugin inside Dassl: against a stand-in of Dassl (tests/plugin/stand_in) and trainers of the shapes of upstream's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oodprompt.backbones import load_backbone
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.engine import TRAINER_REGISTRY, PromptTrainer
from tests.helpers.foreign import Make, Nothing, Weighing, their_trainers
from tests.helpers.runs import REPOSITORY


@pytest.fixture(scope="module")
def checkout() -> Iterator[None]:
    """Dassl's stand-in and a checkout's ``clip`` on the path, with the embedded weights; gone afterwards."""
    own = load_backbone("tiny")

    def build_model(state_dict: dict[str, Tensor], design: Any = None) -> nn.Module:
        clip = load_clip_file("model").CLIP(*astuple(own.shape)[:10]).eval().requires_grad_(False)
        clip.load_state_dict({key: value.half().float() for key, value in own.state_dict().items()})  # as upstream's
        clip.visual.VPT = nn.Parameter(torch.zeros(2, 3))  # as upstream's prompted towers have
        return clip

    before = set(sys.modules)
    sys.path.insert(0, str(REPOSITORY / "tests" / "plugin" / "stand_in"))
    sys.modules["clip.clip"] = module = ModuleType("clip.clip")
    module.build_model = build_model
    yield
    sys.path.remove(str(REPOSITORY / "tests" / "plugin" / "stand_in"))
    for name in set(sys.modules) - before:
        if name.startswith(("dassl", "oodprompt.plugin", "gdown", "clip")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def plugin(checkout: None) -> ModuleType:
    return importlib.import_module("oodprompt.plugin")


@pytest.fixture
def theirs(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Their trainers, registered, and debiasers of ours that are made for tests."""
    engine = importlib.import_module("dassl.engine")
    ours = importlib.import_module("oodprompt.plugin.trainers").OURS
    monkeypatch.setattr(engine.TRAINER_REGISTRY, "_obj_map", dict(engine.TRAINER_REGISTRY._obj_map))
    monkeypatch.setattr(TRAINER_REGISTRY, "_objects", dict(TRAINER_REGISTRY._objects))
    monkeypatch.setattr(importlib.import_module("oodprompt.plugin.adapters"), "_ADAPTERS", {})
    monkeypatch.setattr(importlib.import_module("oodprompt.plugin.trainers"), "OURS", set(ours))
    for debiaser in (Nothing, Weighing):
        TRAINER_REGISTRY.register(type(f"With{debiaser.__name__}", (PromptTrainer,), {"debiaser_class": debiaser}))
        plugin.register_debiaser(f"With{debiaser.__name__}")
    trainers = their_trainers(engine.TrainerX)
    for trainer in trainers.values():
        engine.TRAINER_REGISTRY.register(trainer)
    return trainers


@pytest.fixture
def make(theirs: dict[str, type], data_root: Path, tmp_path: Path) -> Make:
    """``make(trainer, base, KEY, VALUE, ...)``: a trainer of the stand-in's ``build_trainer``."""

    def build(name: str, base: str = "", *opts: Any, out: str = "out") -> Any:
        cfg = importlib.import_module("dassl.config").get_cfg_default()
        cfg.merge_from_list(["TRAINER.NAME", name, "TRAINER.BASE", base, "SEED", 3, "DATASET.ROOT", str(data_root)])
        cfg.merge_from_list(["DATASET.NAME", "OODShapesOnScenes", "DATASET.SHAPES.NUM_TRAIN", 36])
        cfg.merge_from_list(["DATASET.SHAPES.NUM_VAL", 8, "DATASET.SHAPES.NUM_TEST", 12, "INPUT.SIZE", (48, 48)])
        cfg.merge_from_list(["INPUT.TRANSFORMS", ("normalize",), "DATALOADER.TRAIN_X.BATCH_SIZE", 12])
        cfg.merge_from_list(["DATASET.SHAPES.CORRELATION", 0.8, "OPTIM.LR", 0.01, "OPTIM.MAX_EPOCH", 2])
        cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_CONS_LR", 1e-3, "MODEL.BACKBONE.NAME", "tiny"])
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), *opts])
        cfg.freeze()
        torch.manual_seed(cfg.SEED)
        return importlib.import_module("dassl.engine").build_trainer(cfg)

    return build
