"""Words that a small CLIP has never read are told apart by its frozen text tower; nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from oodprompt.backbones import CLIP, load_backbone, tokenize
from oodprompt.studies.digits import CAPTIONS, KINDS
from oodprompt.studies.words import teach_words


def features(clip: CLIP, template: str, names: tuple[str, ...]) -> torch.Tensor:
    with torch.no_grad():
        return F.normalize(clip.encode_text(tokenize([template.replace("{}", n) for n in names])), dim=-1)


@pytest.fixture(scope="module", params=sorted(KINDS))
def taught(request: pytest.FixtureRequest) -> tuple[CLIP, list[int], tuple[str, ...]]:
    clip, names = load_backbone("tiny", ""), KINDS[request.param].classes
    return clip, teach_words(clip, names, CAPTIONS), names


def test_classes_are_told_apart_in_every_template(taught: tuple[CLIP, list[int], tuple[str, ...]]) -> None:
    clip, unknown, names = taught
    assert unknown
    for template in (*CAPTIONS, "a photo of the number {}"):
        t = features(clip, template, names)
        assert (t @ t.T - 2 * torch.eye(len(names))).max() < 0.6


def test_known_words_and_all_else_stay(taught: tuple[CLIP, list[int], tuple[str, ...]]) -> None:
    clip, unknown, _ = taught
    fresh = load_backbone("tiny", "").state_dict()
    for name, value in clip.state_dict().items():
        keep = torch.ones(len(value), dtype=torch.bool) if value.ndim else torch.tensor(True)
        if name == "token_embedding.weight":
            keep[unknown] = False
        assert torch.equal(value[keep], fresh[name][keep]), name
    assert tokenize(["circle"])[0][1].item() not in unknown


def test_same_seed_same_words() -> None:
    names = KINDS["mnist"].classes[:2]
    one, two, three = (load_backbone("tiny", "") for _ in range(3))
    for clip, seed in ((one, 0), (two, 0), (three, 1)):
        teach_words(clip, names, CAPTIONS[:1], seed)
    assert torch.equal(one.token_embedding.weight, two.token_embedding.weight)
    assert not torch.equal(one.token_embedding.weight, three.token_embedding.weight)


def test_a_clip_that_knows_its_words_is_left_alone() -> None:
    clip = load_backbone("tiny", "")
    assert teach_words(clip, ["circle", "square"], ["a photo of a {}."]) == []
    torch.nn.init.normal_(clip.token_embedding.weight)
    before = clip.token_embedding.weight.clone()
    assert teach_words(clip, ["two", "nine"], ["{}"]) == [] and torch.equal(before, clip.token_embedding.weight)
