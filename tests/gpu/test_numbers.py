"""What a GPU computes is what the CPU computes in fp32: features, logits, gradients, features of regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.devices import using
from tests.helpers.runs import Build

pytestmark = pytest.mark.gpu

# The largest difference of a component of a feature of length 1, of a logit (100 times a cosine), and of all gradients
# together as a share of their length. In fp32 they need TRAIN.TF32 none: TF32 keeps 10 bits.
TOLERANCES = {
    "fp32": {"image": 2e-6, "text": 2e-6, "logits": 1e-4, "gradients": 1e-4},
    "amp": {"image": 1e-3, "text": 1e-3, "logits": 0.03, "gradients": 0.01},
    "bf16": {"image": 8e-3, "text": 8e-3, "logits": 0.2, "gradients": 0.1},
}
SCALE = 1024  # of the loss, as gradients of small losses vanish in fp16


def one_step(trainer: PromptTrainer) -> dict[str, Tensor]:
    """What the first training batch gives, on the CPU."""
    trainer.trained.set_mode(training=True)
    batch = next(iter(trainer.dm.train_loader_x))
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    (SCALE * loss).backward()
    gradients = [p.grad for p in trainer.learner.parameters() if p.grad is not None]
    found = {"image": alignment.image_features, "text": alignment.text_features, "logits": alignment.logits}
    found["gradients"] = torch.cat([g.flatten() for g in gradients]) / SCALE
    return {name: value.detach().float().cpu() for name, value in found.items()}


def differences(found: dict[str, Tensor], reference: dict[str, Tensor]) -> dict[str, float]:
    """As ``TOLERANCES`` says, of each; NaN where anything is not finite."""
    result = {name: (found[name] - reference[name]).abs().max().item() for name in ("image", "text", "logits")}
    gradient = reference["gradients"]
    return result | {"gradients": ((found["gradients"] - gradient).norm() / gradient.norm()).item()}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("learner", ["CoOp", "CoCoOp", "MaPLe", "FineTune"])
def test_features_logits_and_gradients(build: Build, device: str, learner: str, precision: str) -> None:
    keys = ("DATALOADER.FEATURE_CACHE", "off", "TRAIN.TF32", "none")
    with using("cpu"):
        reference = one_step(build(learner, *keys, "TRAINER.PREC", "fp32"))
    with using(device):
        trainer = build(learner, *keys, "TRAINER.PREC", precision)
        assert trainer.device.type == device
        found = differences(one_step(trainer), reference)
    tolerances = TOLERANCES[precision]
    assert {name: value for name, value in found.items() if not value <= tolerances[name]} == {}, found


@pytest.mark.parametrize("how", ["tokens", "crops", "masked", "patches"])
@pytest.mark.parametrize("learner", ["CoOp", "MaPLe"])
def test_features_of_regions(build: Build, device: str, learner: str, how: str) -> None:
    def regions(device: str) -> Tensor:
        with using(device):
            trainer = build(
                learner, "TRAINER.PREC", "fp32", "TRAIN.TF32", "none", "REGIONS.FEATURES", how, "REGIONS.GRID", "(2, 3)"
            )
            return trainer.region_features.of("val", trainer.learner).cpu()

    reference, found = regions("cpu"), regions(device)
    assert found.shape == (16 * 6, reference.shape[1])
    assert (found - reference).abs().max() <= TOLERANCES["fp32"]["image"]
    assert torch.allclose(F.normalize(found, dim=-1), found, atol=1e-5)
