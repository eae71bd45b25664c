"""Models of another shape: adapters, and logits that are refused."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment
from tests.helpers.foreign import Make, TheirModel


def features(model: TheirModel, batch: dict[str, Any]) -> Alignment:
    """An adapter for the model of the trainer ``Odd``."""
    image = model.tower(batch["img"])
    text = model.text_encoder(model.prompt_learner(), model.prompt_learner.tokens)
    return Alignment(F.normalize(image, dim=-1), F.normalize(text, dim=-1), model.logit_scale.exp())


@pytest.fixture
def odd(theirs: dict[str, type]) -> type:
    """A trainer whose model has its image tower under another name."""

    class Odd(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self.model.tower = self.model.image_encoder
            del self.model.image_encoder

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Odd)
    return Odd


def test_a_model_of_another_shape_is_told_what_to_write(make: Make, odd: type) -> None:
    with pytest.raises(UserError, match="TRAINER.BASE Odd: its model, TheirModel, has no image_encoder") as caught:
        make("WithNothing", "Odd")
    code = str(caught.value).split("adapter:\n")[1]
    compile(code.replace("\n    ", "\n"), "example", "exec")
    assert '@register_adapter("Odd")' in code


def test_an_adapter_takes_its_place(make: Make, plugin: ModuleType, odd: type) -> None:
    plain = make("WithNothing", "CoOp", out="plain")
    plain.train()
    assert plugin.register_adapter("Odd")(features) is features
    odd.forward_backward = None
    adapted = make("WithNothing", "Odd", out="adapted")
    adapted.train()
    a, b = ([row["loss"] for row in trainer.history] for trainer in (plain, adapted))
    assert np.abs(np.subtract(a, b)).max() < 1e-5
    assert adapted.companion.debiasers[0] and not adapted.companion.learner.trains_image_tower
    plugin.register_adapter("Odd", lambda model, batch: (features(model, batch), torch.tensor(2.0)))
    half = features(adapted.model, next(iter(adapted.test_loader)))
    half = Alignment(half.image_features.half(), half.text_features.half(), half.logit_scale)
    alignment, own = importlib.import_module("oodprompt.plugin.adapters").call_adapter(lambda *_: half, None, {})
    assert alignment.logits.dtype == torch.float32 and own is None
    more = make("WithNothing", "Odd", out="more")
    more.train()
    assert more.history[0]["loss"] == pytest.approx(a[0] + 2, abs=1e-4)


def test_logits_of_another_kind_are_refused(make: Make, theirs: dict[str, type]) -> None:
    registry = importlib.import_module("dassl.engine").TRAINER_REGISTRY

    class Tempered(theirs["CoOp"]):
        def model_inference(self, input: Tensor) -> Tensor:
            return 1.5 * self.model(input)

    class Pairs(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.multi_margin_loss(self.model(image), label)

    class Smoothed(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label, label_smoothing=0.1)

    class Weighted(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label, torch.tensor([1.0, 2.0]))

    class Soft(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), 0.9 * F.one_hot(label, 2) + 0.05)

    class MixUp(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits = self.model(image)
            return 0.7 * F.cross_entropy(logits, label) + 0.3 * F.cross_entropy(logits, 1 - label)

    class Shuffled(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            order = torch.arange(len(label)).flip(0)
            return F.cross_entropy(self.model(image[order]), label[order])

    for cls in (Tempered, Pairs, Smoothed, Weighted, Soft, MixUp, Shuffled):
        registry.register(cls)
    for name in ("Smoothed", "Weighted"):
        with pytest.raises(UserError, match=f"{name}: its cross-entropy has class weights, label smoothing"):
            make("WithNothing", name).train()
    for name in ("Soft", "MixUp", "Shuffled"):
        with pytest.raises(UserError, match=f"{name}: its cross-entropy has other targets than the labels"):
            make("WithNothing", name).train()
    with pytest.raises(UserError, match="Tempered: its logits are not those of its image features"):
        make("WithNothing", "Tempered")
    with pytest.raises(UserError, match="Pairs: it takes no cross-entropy"):
        make("WithNothing", "Pairs").train()


def test_logits_in_half_precision_are_recognised(plugin: ModuleType) -> None:
    watch_type = importlib.import_module("oodprompt.plugin.adapters").Watch
    model = nn.Module()
    model.image_encoder, model.text_encoder = nn.Identity(), nn.Identity()
    model.logit_scale = nn.Parameter(torch.tensor(100.0).log())
    watch = watch_type(model, "Half")
    torch.manual_seed(0)
    z, w = (model.image_encoder(torch.randn(5, 64).half()) for _ in range(2))
    watch.clear()
    model.image_encoder(z), model.text_encoder(w)
    unit_z, unit_w = (x / x.norm(dim=-1, keepdim=True) for x in (z, w))
    logits = model.logit_scale.exp().half() * unit_z @ unit_w.T
    seen = watch.alignment(logits)
    assert seen.image_features.dtype == torch.float32 and torch.equal(seen.logits, logits.float())
    assert watch.alignment(logits + 5) is None and watch.alignment(logits[:4]) is None
    watch.clear()
    full = [model.image_encoder(x.float()) for x in (z, w)]
    watch.clear()
    model.image_encoder(full[0]), model.text_encoder(full[1])
    exact = model.logit_scale.exp() * F.normalize(full[0], dim=-1) @ F.normalize(full[1], dim=-1).T
    assert watch.alignment(exact + 0.05) is not None and watch.alignment(exact + 0.2) is None, (
        "full precision is checked"
    )
    watch.clear()
    model.image_encoder(z), model.text_encoder(w)
    assert watch.alignment(logits.float() + 0.5) is not None, "towers in half precision, logits in full"
    model.text_encoder(w), model.text_encoder(w)
    assert watch.alignment(logits) is not None, "called otherwise than once per image: the first call counts"
    watch.clear()
    assert watch.alignment(logits) is None
