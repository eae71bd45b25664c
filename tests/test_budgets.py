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
from oodprompt.data.distributed import numbers_of_all
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.calls import DEVICE, DeviceError, SeenDevice, as_on_a_gpu, first_steps, with_clusters

Build = Callable[..., PromptTrainer]
ROOM = 1.05
BATCH = 8
STEPS = 3  # the first prepares; the other two are one of each turn, where there are turns

CLASSES = SHAPES  # names that the embedded CLIP knows
ANCHORED = ["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_STATISTICS"]
# Command line; kernels of the dearer of two steps, the same with 2 classes and with 10; copies to the device.
BUDGETS: dict[str, tuple[list[str], int, int]] = {
    "CoOp": (["CoOp"], 166, 0),
    "CoCoOp": (["CoCoOp"], 189, 0),
    "MaPLe": (["MaPLe"], 375, 2),
    "PromptSRC": (["PromptSRC"], 381, 3),
    "CoOpOOD": (["CoOpOOD"], 292, 0),
    "CoOpOOD xcov": (["CoOpOOD", "TRAINER.COOPOOD.L_C", "xcov"], 251, 0),
    "CoOpOOD club": (["CoOpOOD", "TRAINER.COOPOOD.L_C", "club"], 309, 0),
    "anchored, train": ([*ANCHORED, "train"], 267, 0),
    "anchored, batch": ([*ANCHORED, "batch"], 283, 0),
    "anchored, running": ([*ANCHORED, "running"], 300, 0),
    "DebiasedPT": (["DebiasedPT"], 180, 0),
    "DebiasedPT by steps": (["DebiasedPT", "TRAINER.DEBIASEDPT.MEASURE", "step"], 211, 0),
    "GroupDRO": (["GroupDRO"], 194, 0),
    "GroupCoOp": (["GroupCoOp"], 197, 0),
    "RaVL": (["RaVL"], 285, 1),
    "RaVL over MaPLe": (["RaVL", "TRAINER.BASE", "MaPLe"], 743, 4),
}
# These say nothing new with more classes.
WITH_TWO_CLASSES = ("PromptSRC", "CoOpOOD xcov", "CoOpOOD club", "GroupCoOp", "RaVL over MaPLe")


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
        return with_clusters(build(*words, *sizes))

    return make


CASES = [(name, classes) for name in BUDGETS for classes in (2, 10) if classes == 2 or name not in WITH_TWO_CLASSES]


@pytest.mark.parametrize(("name", "classes"), CASES)
def test_a_step_waits_for_nothing_and_keeps_to_its_budget(
    name: str, classes: int, prepared: Callable[..., PromptTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, most_calls, copies = BUDGETS[name]
    as_on_a_gpu(monkeypatch)
    with SeenDevice() as seen:
        trainer = prepared(classes, *words)
        for step in first_steps(trainer, seen, STEPS):
            if step:  # the first may prepare what the others use
                assert not seen.waits
                assert seen.copies.total() <= copies, seen.copies
                assert seen.calls <= ROOM * most_calls, seen.places.most_common(40)


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a value": lambda x: x.sum().item(),
    "a truth value": lambda x: bool(x.any()),
    "unique": lambda x: x.unique(),
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 1],
    "what a mask is given": lambda x: x.index_put_((x > 1,), torch.arange(2, device=x.device)),
    "bincount": lambda x: torch.bincount(x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x),
    "tolist": lambda x: x.tolist(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.ones(3).to(x.device),
    "a tensor of numbers": lambda x: torch.tensor([1, 2], device=x.device),
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen_where_it_is(name: str) -> None:
    with SeenDevice() as seen:
        x = torch.arange(4).to(DEVICE)
        with seen.counted():
            WAITS[name](x)
    assert [where for where in seen.waits if "tests/test_budgets.py:" in where] != []


def test_what_does_not_wait_is_no_wait() -> None:
    with SeenDevice() as seen:
        x = torch.arange(4).to(DEVICE)
        with seen.counted():
            x = torch.ones(4).to(DEVICE, non_blocking=True) + x.masked_fill(x > 1, 0)
            x[x > 1] = 0.0
            x.sort(stable=True).values[x.long()].view(2, 2).to(torch.half)
            torch.repeat_interleave(x, 2).index_add_(0, x.long(), torch.ones(4, device=x.device))
    assert not seen.waits
    assert (seen.casts, seen.copies.total(), seen.calls > 10) == (3, 1, True)


@pytest.mark.parametrize("there", [(), ("attribute",), ("label", "attribute", "index")])
def test_numbers_of_a_batch_come_to_the_device_from_wherever_they_are(there: tuple[str, ...]) -> None:
    """Batches of images have them on the CPU, those of kept features on the device, and those of Dassl on both."""
    with SeenDevice() as seen:
        numbers = {name: torch.arange(3) + i for i, name in enumerate(("label", "attribute", "index"))}
        batch = {name: value.to(DEVICE) if name in there else value for name, value in numbers.items()}
        with seen.counted():
            found = numbers_of_all(batch, DEVICE)
        assert all(seen.has(value) for value in found) and not seen.waits
        assert seen.copies.total() == {0: 1, 1: 2, 3: 0}[len(there)]
        assert [value.tolist() for value in found] == [value.tolist() for value in numbers.values()]


def test_what_cuda_refuses_is_refused() -> None:
    with SeenDevice():
        here, there = torch.ones(2).to(DEVICE), torch.ones(2)
        assert here.device == DEVICE != there.device and (here + there.sum()).device == DEVICE
        with pytest.raises(DeviceError, match="same device"):
            here + there
        with pytest.raises(DeviceError, match="numpy"):
            here.numpy()
        here.cpu().numpy()
