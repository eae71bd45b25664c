"""The documents say what the code does."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest
import torch

from oodprompt.engine.registry import TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from tests.conftest import REPOSITORY


def test_config_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("config_reference", REPOSITORY / "scripts" / "config_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PATH.read_text() == module.reference(), "run python scripts/config_reference.py"


def test_files_named_in_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    named = set(
        re.findall(r"(?:scripts|configs|docs|datasets|trainers|oodprompt|tests|benchmarks)/[\w./-]+\.\w+", text)
    )
    assert named and [name for name in named if not (REPOSITORY / name).exists()] == []


def test_debiaser_of_the_documentation_runs(
    build: Callable[..., PromptTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (REPOSITORY / "docs" / "debiasers.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.setattr(TRAINER_REGISTRY, "_objects", dict(TRAINER_REGISTRY._objects))
    exec(code, {"__name__": "documented"})
    trainer = build("RareFirst", "TRAINER.GROUPS", "true")
    trainer.before_train()
    batch = next(iter(trainer.loader("train")))
    weight = trainer.debiasers[0].weight
    groups = torch.tensor([2 * d.label + d.attribute for d in trainer.dataset.train_x])
    assert weight.mean().item() == pytest.approx(1) and len(weight[groups == 1].unique()) == 1
    loss, _ = trainer.objective(trainer.align(batch), batch)
    assert loss != build("CoOp").objective(trainer.align(batch), batch)[0]


def test_every_debiaser_is_documented() -> None:
    text = (REPOSITORY / "docs" / "debiasers.md").read_text() + (REPOSITORY / "README.md").read_text()
    names = [name for name, trainer in TRAINER_REGISTRY.items() if trainer.debiaser_class]
    assert len(names) > 8 and [name for name in names if f"`{name}`" not in text] == []
