"""What a step may cost on a GPU: no wait of the host, and no more kernels than it took when this was written.

Steps are counted on a device that is seen on a CPU (``tests/helpers/calls.py``), in amp, on the embedded CLIP of 3 blocks.
Where a change makes a step cheaper, lower its number; where a dearer step is worth it, raise the number and say why in the
commit. Losses are looked at as on a GPU, every 20 steps, so that no step here does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oodprompt.datasets.rendering import SHAPES
from PIL import Image
from yacs.config import CfgNode

from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.methods.attributes import DiscoveredClusters
from tests.helpers.calls import SeenDevice, as_on_a_gpu, first_steps

Build = Callable[..., PromptTrainer]
ROOM = 1.05
BATCH = 8
STEPS = 3  # the first prepares; the other two are one of each turn, where there are turns

CLASSES = SHAPES  # names that the embedded CLIP knows
ANCHORED = ["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_STATISTICS"]
# Command line, and the kernels of the dearer of two steps, with 2 classes and with 10.
BUDGETS: dict[str, tuple[list[str], tuple[int, int]]] = {
    "CoOp": (["CoOp"], (0, 0)),
    "CoCoOp": (["CoCoOp"], (0, 0)),
    "MaPLe": (["MaPLe"], (0, 0)),
    "PromptSRC": (["PromptSRC"], (0, 0)),
    "CoOpOOD": (["CoOpOOD"], (0, 0)),
    "CoOpOOD xcov": (["CoOpOOD", "TRAINER.COOPOOD.L_C", "xcov"], (0, 0)),
    "CoOpOOD club": (["CoOpOOD", "TRAINER.COOPOOD.L_C", "club"], (0, 0)),
    "anchored, train": ([*ANCHORED, "train"], (0, 0)),
    "anchored, batch": ([*ANCHORED, "batch"], (0, 0)),
    "anchored, running": ([*ANCHORED, "running"], (0, 0)),
    "DebiasedPT": (["DebiasedPT"], (0, 0)),
    "DebiasedPT by steps": (["DebiasedPT", "TRAINER.DEBIASEDPT.MEASURE", "step"], (0, 0)),
    "GroupDRO": (["GroupDRO"], (0, 0)),
    "GroupCoOp": (["GroupCoOp"], (0, 0)),
    "RaVL": (["RaVL"], (0, 0)),
    "RaVL over MaPLe": (["RaVL", "TRAINER.BASE", "MaPLe"], (0, 0)),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Images of noise: those of a training, and as many as others need."""
    folder, numbers = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    files = [str(folder / f"{i}.png") for i in range(BATCH * (STEPS + 1) + 2 * len(CLASSES))]
    for file in files:
        Image.fromarray(numbers.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file)
    return files


@pytest.fixture
def prepared(images: list[str], build: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PromptTrainer]:
    """``prepared(classes, trainer, *more)``: a trainer over images of so many classes, as on a GPU."""

    def make(classes: int, *words: Any) -> PromptTrainer:
        data = [Datum(file, i % classes, 0, CLASSES[i % classes], i // classes % 2) for i, file in enumerate(images)]
        train = BATCH * (STEPS + 1)

        class Noise(DatasetBase):
            attribute_names = ("water", "land")
            attribute_prompts = (("a photo on water.",), ("a photo on land.",))

            def __init__(self, cfg: CfgNode) -> None:
                super().__init__(cfg, data[:train], test=data[train:])

        monkeypatch.setitem(DATASET_REGISTRY._objects, "Noise", Noise)
        sizes = [
            "DATASET.NAME",
            "Noise",
            "DATALOADER.TRAIN_X.BATCH_SIZE",
            BATCH,
            "TRAINER.PREC",
            "amp",
            "VERBOSE",
            "False",
        ]
        trainer = build(*words, *sizes)
        regions = trainer.region_features.regions("train").owner
        found = DiscoveredClusters((1,), {"train": torch.arange(len(regions)) % 3}, {"train": regions})
        trainer.attributes.discovered._found = found
        return trainer

    return make


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_step_waits_for_nothing_and_keeps_to_its_budget(
    name: str, classes: int, prepared: Callable[..., PromptTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, budgets = BUDGETS[name]
    as_on_a_gpu(monkeypatch)
    with SeenDevice() as seen:
        trainer = prepared(classes, *words)
        calls = 0
        for step in first_steps(trainer, seen, STEPS):
            if step >= STEPS - 2:
                assert not seen.waits
                calls = max(calls, seen.calls)
    print(*seen.places.most_common(70), sep="\n")
    print(f"MEASURED {name} {classes} {calls} {seen.casts} {dict(seen.copies)}")
