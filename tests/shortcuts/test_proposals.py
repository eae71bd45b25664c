"""Words that say the same are one proposal, and its names split the images as its word does."""

from __future__ import annotations

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


def test_proposals_are_in_the_order_of_the_words_that_lead_them() -> None:
    """The sea is in most images, so that its weaker opposite leads, and the sofa in between comes first."""
    rng, n = np.random.default_rng(0), 4000
    label = np.repeat([0, 1], n // 2)
    sea = rng.random(n) < np.array([0.98, 0.3])[label]
    meadow = ~sea & (rng.random(n) < 0.92)
    sofa = rng.random(n) < np.array([0.17, 0.83])[label]
    axes = torch.eye(6)
    z = rng.normal(0, 0.05, (n, 6))
    for axis, present in enumerate((sea, meadow, sofa), 1):
        z[:, axis] += 2 * present - 1
    words = Words(("sea", "meadow", "sofa"), ("",) * 3, axes[1:4], axes[1:4])
    vocabulary = Vocabulary(words.words, words.sections, "a test")
    features, classes = torch.from_numpy(z).float(), torch.stack([-axes[0], axes[0]])
    found = propose(words, vocabulary, features, label, classes, show=False)
    assert [found.word(p.best) for p in found.proposals] == ["sofa", "meadow"]
    assert found.word(found.proposals[1].opposite[0]) == "sea"


def test_names_are_in_the_order_of_classes() -> None:
    assert proposed((0.95, 0.05))[0].proposals[0].names[0] in ("sea", "lake")


def of_three_scenes(most: int = 12, noise: float = 0.1) -> tuple[Proposals, torch.Tensor]:
    """Sea, meadow and snow, each with one of three classes."""
    rng, n = np.random.default_rng(0), 900
    label = np.repeat([0, 1, 2], n // 3)
    scene = np.where(rng.random(n) < 0.9, label, rng.integers(0, 3, n))
    axes = torch.eye(8)
    z = torch.from_numpy(rng.normal(0, noise, (n, 8))).float() + axes[scene] + axes[3 + label]
    direction = torch.cat([axes[:3], axes[:3].sum(dim=0, keepdim=True), axes[6:7]])
    words = Words(("sea", "meadow", "snow", "scene", "lamp"), ("",) * 5, direction, F.normalize(direction, dim=-1))
    vocabulary = Vocabulary(words.words, words.sections, "a test")
    features = F.normalize(z, dim=-1)
    return propose(words, vocabulary, features, label, axes[3:6], most, show=False), features


def test_an_attribute_of_three_values_gets_three_names() -> None:
    assert of_three_scenes()[0].proposals[0].names == ("sea", "meadow", "snow")


def test_the_agreement_is_that_of_the_names() -> None:
    for found, features in (proposed((0.05, 0.95))[:2], of_three_scenes(noise=0.3)):
        first = found.proposals[0]
        place = [found.words.words.index(name) for name in first.names]
        split = (features @ found.words.name[place].T).argmax(dim=1) == first.names.index(found.word(first.best))
        assert first.agreement == pytest.approx(np.corrcoef(split, found.present(first, features)[1])[0, 1])


def test_a_word_that_no_other_tells_apart_has_no_names() -> None:
    found, features, _ = proposed((0.05, 0.95))
    label, classes = np.repeat([0, 1], 400), torch.stack([-torch.eye(8)[0], torch.eye(8)[0]])
    alone = propose(found.words.take([0]), found.vocabulary, features, label, classes, show=False).proposals[0]
    assert alone.names == () and alone.agreement is None and alone.strong


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


def test_fewer_proposals_have_the_names_that_they_have_among_more() -> None:
    (fewer, _), (found, _) = of_three_scenes(most=1), of_three_scenes()
    (only,), (first, *others) = fewer.proposals, found.proposals
    assert only.best.word == first.best.word and only.names == first.names == ("sea", "meadow", "snow")
    assert fewer.further == found.further + sum(1 + len(p.same) + len(p.opposite) for p in others) > 0
