"""Steps on a GPU: the host waits for none, graphs and fused optimisers compute the same, attention makes no plan a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import oodprompt.trainers  # noqa: F401 (registers them)
import pytest
import torch
from torch import Tensor

from oodprompt.backbones import CLIP, CLIPShape
from oodprompt.config.keys import get_cfg_default
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.engine.optim import build_optimizer
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.devices import using
from tests.helpers.runs import Build

pytestmark = pytest.mark.gpu

# What keeps preparations short, and lets discovery find something.
SHORT = (
    *("TRAINER.JTT.FIRST_EPOCHS", 1, "TRAINER.AFR.FIRST_EPOCHS", 1, "TRAINER.DFR.NUM_RETRAINS", 1),
    *("DISCOVERY.THRESHOLD", -1.0, "DISCOVERY.BOTH_SIGNS", False, "DISCOVERY.K_RANGE", "(4, 6)", "DISCOVERY.EPOCHS", 1),
)
TOWER = ("TRAINER.RAVL.TUNE", "image_encoder", "OPTIM.NAME", "adamw")
# Methods are timed under their own defaults, and some in a second form that takes other ways through the code.
FORMS: dict[str, tuple[str, tuple[Any, ...]]] = {name: (name, ()) for name, _ in TRAINER_REGISTRY.items()}
FORMS |= {
    "AFR": ("AFR", ("DATALOADER.TRAIN_X.BATCH_SIZE", 4)),  # their epochs are of a part of the images
    "SUBG": ("SUBG", ("DATALOADER.TRAIN_X.BATCH_SIZE", 4)),
    "anchored": ("CoOpOOD", ("TRAINER.COOPOOD.ANCHOR", "attributes")),
    "anchored, batch": (
        "CoOpOOD",
        ("TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.COOPOOD.ANCHOR_STATISTICS", "batch"),
    ),
    "anchored over MaPLe": ("CoOpOOD", ("TRAINER.COOPOOD.ANCHOR", "attributes", "TRAINER.BASE", "MaPLe")),
    "anchored on regions": ("CoOpOOD", ("TRAINER.COOPOOD.ANCHOR", "regions")),
    "DebiasedPT, step": ("DebiasedPT", ("TRAINER.DEBIASEDPT.MEASURE", "step")),
    "GroupDRO, regions": ("GroupDRO", ("TRAINER.GROUPS", "regions")),
    "RaVL over the tower": ("RaVL", TOWER),
    "FineTune on captions": ("FineTune", ("TRAINER.FINETUNE.CAPTIONS", 0.8)),
    "CoOp without cache": ("CoOp", ("DATALOADER.FEATURE_CACHE", "off")),
    "CoOp by adam": ("CoOp", ("OPTIM.NAME", "adam")),
}


def ready(trainer: PromptTrainer) -> Iterator[Any]:
    """Batches of the first epoch of a trainer that is ready for its steps."""
    trainer.before_train()
    trainer.epoch = 0
    trainer.before_epoch()
    batches = trainer.encoder.batches("train")
    batches.set_epoch(0)
    trainer.num_batches = len(batches)
    return iter(batches)


def steps(trainer: PromptTrainer, batches: Iterator[Any], numbers: range) -> None:
    for number in numbers:
        trainer.batch_idx = number
        trainer.forward_backward(next(batches))


@contextlib.contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Torch raises where the host would wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("form", "precision"),
    [*((form, "amp") for form in FORMS), ("CoOp", "fp32"), ("MaPLe", "bf16"), ("anchored", "fp32")],
)
def test_a_step_makes_the_host_wait_for_nothing(build: Build, device: str, form: str, precision: str) -> None:
    """Between two looks at the losses, of which the last step of an epoch is one."""
    name, keys = FORMS[form]
    with using(device):
        trainer = build(name, *SHORT, *keys, "TRAINER.PREC", precision)
        if not trainer.trained.are_trained:
            return
        batches = ready(trainer)
        assert trainer.num_batches >= 4
        steps(trainer, batches, range(1))
        with no_waits(device):
            steps(trainer, batches, range(1, 3))


def test_a_wait_is_seen(device: str) -> None:
    """The test above can fail."""
    if device == "cpu":
        pytest.skip("the host waits for a GPU alone")
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchron"), no_waits(device):
        x.sum().item()


@pytest.mark.parametrize("precision", ["fp32", "amp"])
@pytest.mark.parametrize("form", ["CoOp", "CoCoOp", "MaPLe", "PromptSRC", "CoOpOOD"])
def test_steps_from_graphs_are_those_without(build: Build, device: str, form: str, precision: str) -> None:
    def trained(how: str) -> tuple[dict[str, Tensor], PromptTrainer]:
        trainer = build(form, "TRAINER.PREC", precision, "TRAIN.COMPILE", how, "OPTIM.LR", 0.01)
        steps(trainer, ready(trainer), range(5))
        return {k: v.detach().double().cpu() for k, v in trainer.learner.named_parameters() if v.requires_grad}, trainer

    with using(device):
        start = {k: v.detach().double().cpu() for k, v in build(form).learner.named_parameters() if v.requires_grad}
        (want, _), (got, trainer) = trained("off"), trained("graphs")
    if device == "cuda":
        captures = trainer.clip.captures
        assert captures is not None and captures._made, "nothing was recorded"
    moved = torch.cat([(want[k] - start[k]).flatten() for k in want]).norm()
    apart = torch.cat([(got[k] - want[k]).flatten() for k in want]).norm()
    assert moved > 0 and apart <= (1e-3 if precision == "fp32" else 2e-2) * moved, (apart, moved)


@pytest.mark.parametrize("name", ["sgd", "adam", "amsgrad", "adamw", "radam", "rmsprop"])
def test_optimisers_are_those_of_torch_without_fusing(device: str, name: str) -> None:
    """Ten steps of an optimiser as runs have it, and of the same one by ``foreach``; 1e-6 apart at most."""
    cfg = get_cfg_default().OPTIM
    cfg.NAME, cfg.LR, cfg.WEIGHT_DECAY = name, 0.01, 5e-4

    def parameters() -> list[torch.nn.Parameter]:
        random = torch.Generator().manual_seed(3)
        return [torch.nn.Parameter(torch.randn(size, generator=random).to(device)) for size in (7, 300, 1)]

    ours, theirs = parameters(), parameters()
    first = build_optimizer(ours, cfg)
    settings = {k: v for k, v in first.defaults.items() if k not in ("foreach", "fused", "decoupled_weight_decay")}
    second = type(first)(theirs, **settings, foreach=True)
    random = torch.Generator().manual_seed(4)
    for _ in range(10):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=random).to(device)
            b.grad = a.grad.clone()
        first.step()
        second.step()
    assert not torch.equal(ours[0], parameters()[0])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-6), (a - b).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["tokens", "masked", "crops"])
def test_attention_makes_no_plan_for_every_number_of_regions(device: str, how: str, dtype: torch.dtype) -> None:
    """A step with numbers of regions that were not there before takes no longer than one with those that were."""
    large = device == "cuda"
    shape = (
        CLIPShape(512, 224, 4, 768, 16, 77, 100, 64, 1, 1) if large else CLIPShape(64, 32, 2, 64, 8, 77, 100, 64, 1, 1)
    )
    torch.manual_seed(0)
    clip = CLIP(shape).to(device)
    images = torch.randn(8, 3, shape.image_resolution, shape.image_resolution, device=device)
    random = torch.Generator().manual_seed(5)

    def seconds(numbers: list[int]) -> float:
        low = [torch.rand(n, 2, generator=random) * 0.5 for n in numbers]
        boxes = [torch.cat([a, a + 0.25 + 0.2 * torch.rand(len(a), 2, generator=random)], dim=1) for a in low]
        if large:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(device, dtype):
            clip.region_features(images, boxes, how).float().square().sum().backward()
        if large:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    same = [4, 3, 5, 2, 6, 4, 3, 5]
    known = [seconds(same) for _ in range(8)][3:]
    others = [seconds(torch.randint(1, 7, (8,), generator=random).tolist()) for _ in range(10)]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in clip.parameters())
    if large:
        assert median(others) <= 2 * median(known) + 0.005, (known, others)
