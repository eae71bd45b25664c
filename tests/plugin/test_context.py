"""What a debiaser sees of a trainer that is not ours: its CLIP, its data, and what it lacks."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.errors import UserError
from tests.helpers.foreign import CLASSES, Make


def test_the_context_is_that_of_clip_and_the_data(make: Make) -> None:
    trainer = make("WithWeighing", "CoOp")
    context, clip = trainer.companion.debiasers[0].context, load_backbone("tiny")
    clip.load_state_dict({key: value.half().float() for key, value in clip.state_dict().items()})
    assert context.features_are_frozen and context.data.classnames == list(CLASSES)
    assert all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), context.clip.state_dict().values(), strict=True)
    )
    loader = torch.utils.data.DataLoader(trainer.train_loader_x.dataset, 100)
    batch = next(iter(loader))
    expected = F.normalize(clip.encode_image(batch["img"]), dim=-1)
    torch.testing.assert_close(context.data.train.features(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(context.data.train.label, batch["label"])
    assert context.data.train.attribute.tolist() == [d.attribute for d in trainer.dm.dataset.train_x]
    assert len(context.data.val.label) == 8 and context.attributes.num_groups() == 4
    assert trainer.companion.attributes["val"].tolist() == [d.attribute for d in trainer.dm.dataset.val]
    trainer.set_model_mode("train")
    z, logits = context.first_stage.outputs(context.data.val)
    with torch.no_grad():
        images = next(iter(trainer.val_loader))["img"]
        torch.testing.assert_close(logits, trainer.model(images), atol=1e-3, rtol=1e-4)
    assert z.shape == (8, clip.shape.embed_dim) and trainer.model.prompt_learner.training


def test_an_image_tower_of_their_own_is_noticed(make: Make, theirs: dict[str, type]) -> None:
    class Shifted(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            with torch.no_grad():
                self.model.image_encoder.proj.copy_(self.model.image_encoder.proj.flip(1))

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Shifted)
    assert not make("WithWeighing", "Shifted").companion.debiasers[0].context.features_are_frozen


def test_the_first_clip_that_is_built_is_the_frozen_one(make: Make, theirs: dict[str, type]) -> None:
    class TwoClips(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            module, build = sys.modules["clip.clip"], sys.modules["clip.clip"].build_model
            teacher = build({})
            assert teacher is not None and module.build_model is build

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(TwoClips)
    state = load_backbone("tiny").state_dict()
    own = make("WithWeighing", "TwoClips").companion.clip.state_dict()
    assert torch.equal(own["visual.proj"], state["visual.proj"].half().float())


def test_a_trained_image_tower_is_noticed(make: Make) -> None:
    trainer = make("WithWeighing", "MaPLe")
    assert not trainer.companion.debiasers[0].context.features_are_frozen
    assert trainer.model.prompt_learner.half_layer.weight.dtype == torch.float32, "fp32 throughout, as its towers are"


def test_what_cannot_be_here_says_so(make: Make, theirs: dict[str, type]) -> None:
    context = make("WithWeighing", "CoOp").companion.debiasers[0].context
    with pytest.raises(UserError, match="CoOp trained alone, which cannot be done.*DISCOVERY.FROM"):
        context.first_stage.fit(1, None)
    with pytest.raises(UserError, match="'ctx' of the prompt learner, which CoOp"):
        _ = context.learner.ctx
    with pytest.raises(UserError, match="the parameters of CoOp"):
        context.learner.parameters()
    assert not hasattr(context.learner, "anything")
    with pytest.raises(UserError, match="RWG chooses the images of an epoch"):
        make("WithNothing", "CoOp", "TRAINER.STACK", ("RWG",))
    with pytest.raises(UserError, match="RaVL needs features of regions, and MaPLe trains"):
        make("RaVL", "MaPLe")
    with pytest.raises(UserError, match="no trainer 'MaPLE' is registered with Dassl here .did you mean 'MaPLe'"):
        make("CoOpOOD", "MaPLE")
    with pytest.raises(UserError, match="no trainer 'DebiasedPT'"):
        make("CoOpOOD", "DebiasedPT")
    with pytest.raises(UserError, match="TRAINER.STACK: CoOp is a prompt learner"):
        make("CoOpOOD", "CoOp", "TRAINER.STACK", ("CoOp",))


def test_ravl_with_found_regions(make: Make, tmp_path: Path) -> None:
    from oodprompt.regions.boxes import digest

    with pytest.raises(UserError, match="DISCOVERY.FROM"):
        make("RaVL", "CoOp").before_train()
    trainer = make("RaVL", "CoOp", "DISCOVERY.FROM", str(tmp_path))
    regions = trainer.companion.region_features.regions("train")
    assignment = np.arange(len(regions.owner)) % 4
    content = {"clusters": np.array([2]), "assignment_train": assignment, "digest_train": np.array(digest(regions))}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    (tmp_path / "discovery.npz").write_bytes(buffer.getvalue())
    trainer.before_train(), trainer.set_model_mode("train")
    assert trainer.companion.debiasers[0].spurious.tolist() == [a == 2 for a in assignment]
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 9, 0
    ce = F.cross_entropy(trainer.model(batch["img"]), batch["label"]).item()
    summary = trainer.forward_backward(batch)
    assert summary["L_R"] > 0 and summary["loss"] == pytest.approx(
        ce + 0.2 / 0.8 * (summary["L_R"] + summary["L_A"]), rel=1e-4
    )
    clip: CLIP = trainer.companion.clip
    boxes = regions.boxes.view(36, 4, 4)[batch["index"]]
    expected = F.normalize(clip.region_features(batch["img"], list(boxes), "auto").float(), dim=-1)
    found = trainer.companion.region_features.of_step(batch).features
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)
