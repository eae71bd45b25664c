"""A ResNet with channels last is the same tower: features, gradients, regions, weights in files."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import digest
from oodprompt.engine import assembly
from tests.helpers.small_data import MakeCfg
from tests.helpers.towers import RESNET, SHAPE

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def test_channels_are_last_where_a_gpu_computes_in_half_precision() -> None:
    resnet, vit = CLIP(RESNET), CLIP(SHAPE)
    assert [assembly.is_channels_last(resnet, GPU, p) for p in ("amp", "fp16", "bf16", "fp32")] == [1, 1, 1, 0]
    assert not assembly.is_channels_last(resnet, CPU, "bf16") and not assembly.is_channels_last(vit, GPU, "amp")


def test_the_tower_is_the_same(make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CLIP(RESNET).eval()
    monkeypatch.setattr(assembly, "load_backbone", lambda *args, **keys: copy.deepcopy(plain))
    monkeypatch.setattr(assembly, "is_channels_last", lambda clip, device, precision: precision == "bf16")
    cfg = make_cfg(INPUT__SIZE=(RESNET.image_resolution,) * 2)
    clip = assembly.load_clip(cfg, CPU, "bf16")
    tower = copy.deepcopy(clip.visual)  # as fine-tuning has it
    assert tower.layer1[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    assert assembly.load_clip(cfg, CPU).visual.layer1[0].conv2.weight.is_contiguous()
    assert digest(clip.visual) == digest(plain.visual)

    images = torch.randn(3, 3, *cfg.INPUT.SIZE, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([[0, 0, 0.5, 1.0], [0.1, 0.2, 0.9, 0.8]])] * 3
    for how in ("crops", "roi", "patches"):
        ours, theirs = (model.region_features(images, boxes, how) for model in (clip, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    gradients = []
    for visual in (tower, plain.visual):
        z = visual(images)
        z.square().sum().backward()
        gradients.append({"z": z, **{name: p.grad for name, p in visual.named_parameters()}})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)

    stream = io.BytesIO()
    torch.save(tower.state_dict(), stream)
    stream.seek(0)
    with torch.no_grad():
        for parameter in plain.visual.parameters():
            parameter.zero_()
    plain.visual.load_state_dict(torch.load(stream))
    assert plain.visual.conv2.weight.is_contiguous() and digest(plain.visual) == digest(tower)
