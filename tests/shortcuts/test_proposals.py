"""Words that say the same are one proposal, and its names split the images as its word does."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oodprompt.errors import UserError
from oodprompt.shortcuts.proposals import Proposals, propose
from oodprompt.shortcuts.vocabulary import Vocabulary
from oodprompt.shortcuts.words import Words

NAMES = ("sea", "lake", "meadow", "sofa", "lamp")


def proposed(share: tuple[float, float], reverse: bool = False) -> tuple[Proposals, torch.Tensor, np.ndarray]:
    """Sea along axis 1, in ``share`` of the images of either class; lake nearly the same, meadow the opposite."""
    rng, n = np.random.default_rng(0), 800
    label = np.repeat([0, 1], n // 2)
    sea = rng.random(n) < np.array(share)[label]
    z = rng.normal(0, 0.15, (n, 8))
    z[:, 0] += 2 * label - 1
    z[:, 1] += 2 * sea - 1
    features = F.normalize(torch.from_numpy(z).float(), dim=-1)
    axes = torch.eye(8)
    direction = torch.stack([axes[1], axes[1] + 0.1 * axes[4], -axes[1], axes[2], axes[3]])
    words = Words(NAMES, ("",) * 5, direction, F.normalize(direction + 0.5 * axes[7], dim=-1))
    if reverse:
        words = words.take(list(range(5))[::-1])
    vocabulary = Vocabulary(words.words, words.sections, "a test")
    return propose(words, vocabulary, features, label, torch.stack([-axes[0], axes[0]]), show=False), features, sea


def test_words_of_one_attribute_are_one_proposal_with_names_for_both_sides() -> None:
    found, features, sea = proposed((0.05, 0.95))
    first = found.proposals[0]
    assert [p.strong for p in found.proposals].count(True) == 1 and first.strong
    everything = {found.word(a) for a in (first.best, *first.same, *first.opposite)}
    assert everything == {"sea", "lake", "meadow"}
    assert first.names in (("meadow", "sea"), ("meadow", "lake")) and first.agreement > 0.95
    score, present = found.present(first, features)
    assert abs(np.corrcoef(present, sea)[0, 1]) > 0.95 and ((score > 0) == present).all()


def test_the_rarer_side_leads() -> None:
    found, _, _ = proposed((0.02, 0.35), reverse=True)
    assert found.word(found.proposals[0].best) in ("sea", "lake")
    assert found.proposals[0].goes_with == 1


def test_names_are_in_the_order_of_classes() -> None:
    assert proposed((0.95, 0.05))[0].proposals[0].names[0] in ("sea", "lake")


def of_three_scenes(most: int) -> Proposals:
    """Sea, meadow and snow, each with one of three classes."""
    rng, n = np.random.default_rng(0), 900
    label = np.repeat([0, 1, 2], n // 3)
    scene = np.where(rng.random(n) < 0.9, label, rng.integers(0, 3, n))
    axes = torch.eye(8)
    z = torch.from_numpy(rng.normal(0, 0.1, (n, 8))).float() + axes[scene] + axes[3 + label]
    direction = torch.cat([axes[:3], axes[:3].sum(dim=0, keepdim=True), axes[6:7]])
    words = Words(("sea", "meadow", "snow", "scene", "lamp"), ("",) * 5, direction, F.normalize(direction, dim=-1))
    vocabulary = Vocabulary(words.words, words.sections, "a test")
    return propose(words, vocabulary, F.normalize(z, dim=-1), label, axes[3:6], most, show=False)


def test_an_attribute_of_three_values_gets_three_names() -> None:
    assert of_three_scenes(12).proposals[0].names == ("sea", "meadow", "snow")


def test_names_are_the_same_however_many_proposals_are_asked_for() -> None:
    assert of_three_scenes(1).proposals[0].names == ("sea", "meadow", "snow")


def test_the_same_data_give_the_same_proposals() -> None:
    one, other = (proposed((0.05, 0.95))[0] for _ in range(2))
    assert [(p.best.word, p.names, p.best.v) for p in one.proposals] == [
        (p.best.word, p.names, p.best.v) for p in other.proposals
    ]


def test_what_a_stronger_proposal_explains_is_not_strong() -> None:
    """Sofas come with the sea and not with the class: alone they are strong, among images of the sea they are not."""
    rng, n = np.random.default_rng(0), 800
    label = np.repeat([0, 1], n // 2)
    sea = np.where(rng.random(n) < 0.95, label, 1 - label)
    sofa = np.where(rng.random(n) < 0.87, sea, 1 - sea)
    z = rng.normal(0, 0.1, (n, 6))
    z[:, 1] += 2 * sea - 1
    z[:, 2] += 2 * sofa - 1
    axes = torch.eye(6)
    direction = torch.stack([axes[1], axes[2]])
    words = Words(("sea", "sofa"), ("", ""), direction, direction)
    vocabulary = Vocabulary(words.words, words.sections, "a test")
    features, classes = torch.from_numpy(z).float(), torch.stack([-axes[0], axes[0]])
    first, second = propose(words, vocabulary, features, label, classes, show=False).proposals
    assert first.strong and second.best.strong and second.after[0] < 0.2 and not second.strong


def test_one_class_is_refused() -> None:
    found, features, _ = proposed((0.05, 0.95))
    with pytest.raises(UserError, match="two classes at least"):
        propose(found.words, found.vocabulary, features, np.zeros(800, int), torch.eye(8)[:2], show=False)


def test_fewer_proposals_may_be_asked_for() -> None:
    found, features, _ = proposed((0.05, 0.95))
    label = np.repeat([0, 1], 400)
    classes = torch.stack([-torch.eye(8)[0], torch.eye(8)[0]])
    fewer = propose(found.words, found.vocabulary, features, label, classes, most=1, show=False)
    assert (
        len(fewer.proposals) == 1 and fewer.further == len(found.words.words) - 3 - fewer.too_rare or fewer.further >= 0
    )
    assert dataclasses.asdict(fewer.proposals[0].best)["word"] == found.proposals[0].best.word
