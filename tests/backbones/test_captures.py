"""Recorded passes against the functions themselves, with a recorder that needs no GPU."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from oodprompt.backbones import CLIP, CLIPShape
from oodprompt.backbones.captures import Captures
from tests.helpers.clip_checks import random
from tests.helpers.tape import Tape

SHAPE = CLIPShape(48, 32, 3, 128, 8, 32, 100, 128, 2, 3)
WEIGHT = random(4, 5, seed=5)


def function(x: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(x @ WEIGHT) * y


def inputs(seed: int, y_learns: bool = False) -> tuple[Tensor, Tensor]:
    x, y = random(3, 4, seed=seed), random(3, 5, seed=seed + 1)
    return x.requires_grad_(), y.requires_grad_(y_learns)


def gradients(out: Tensor, given: Sequence[Tensor], seed: int = 7) -> list[Tensor]:
    learned = [x for x in given if x.requires_grad]
    return list(torch.autograd.grad((out * random(*out.shape, seed=seed)).sum(), learned, retain_graph=True))


def assert_equal(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(ours) == len(expected) > 0
    for a, b in zip(ours, expected, strict=True):
        assert b.any() and torch.equal(a, b)


@pytest.fixture
def tapes() -> list[Tape]:
    return []


@pytest.fixture
def captures(tapes: list[Tape]) -> Captures:
    def recorder() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    return Captures(after=2, recorder=recorder)


@pytest.mark.parametrize("y_learns", [False, True])
def test_replays_equal_the_function(captures: Captures, tapes: list[Tape], y_learns: bool) -> None:
    for step in range(6):
        given = inputs(10 * step, y_learns)
        out, expected = captures("f", function, *given), function(*given)
        assert_equal([out.detach(), *gradients(out, given)], [expected.detach(), *gradients(expected, given)])
        assert len(tapes) == (step >= 2)
    assert tapes[0].replays == 2 * 4 and tapes[0].warm_ups == 3


def test_outputs_and_gradients_stay_what_they_were(captures: Captures) -> None:
    captures.after = 0
    first = inputs(0)
    out = captures("f", function, *first)
    kept = [out.detach(), *gradients(out, first)]
    copies = [x.clone() for x in kept]
    second = inputs(50)
    gradients(captures("f", function, *second), second)
    assert_equal(kept, copies)


def test_two_passes_ahead_of_their_backward_passes(captures: Captures) -> None:
    """The second forward pass overwrites the values of the first, which are computed again for its gradients."""
    captures.after = 0
    pairs = [inputs(0), inputs(50)]
    outs = [captures("f", function, *given) for given in pairs]
    for given, out in zip(pairs, outs, strict=True):
        assert_equal(gradients(out, given), gradients(function(*given), given))


def test_two_backward_passes_of_one_forward_pass(captures: Captures, tapes: list[Tape]) -> None:
    """A recorded backward pass may overwrite what it read, so the forward pass goes ahead of it again."""
    captures.after = 0
    given = inputs(0)
    out, expected = captures("f", function, *given), function(*given)
    for seed in (1, 2):
        assert_equal(gradients(out, given, seed), gradients(expected, given, seed))
    assert tapes[0].replays == 4


def test_a_frozen_input_is_copied_when_it_changes(captures: Captures) -> None:
    captures.after = 0
    x, y = inputs(0)
    for change in range(3):
        with torch.no_grad():
            y += change
        assert torch.equal(captures("f", function, x, y), function(x, y))
    for seed in range(20):  # other tensors, which may get the memory of the former
        y = random(3, 5, seed=seed)
        assert torch.equal(captures("f", function, x, y), function(x, y))
        del y
        gc.collect()


def test_other_shapes_and_functions_have_recordings_of_their_own(captures: Captures, tapes: list[Tape]) -> None:
    captures.after = 0
    x = random(2, 4).requires_grad_()
    for what, f in (("f", function), ("g", lambda x, y: x.sum(1, keepdim=True) + y)):
        for rows in (2, 3, 2):
            x, y = random(rows, 4, seed=rows).requires_grad_(), random(rows, 5)
            assert torch.equal(captures(what, f, x, y), f(x, y))
    assert len(tapes) == 4
    assert torch.equal(captures("h", function, x, y), function(x, y)) and len(tapes) == 4, "there is room for no more"


def test_without_gradients_nothing_is_recorded(captures: Captures, tapes: list[Tape]) -> None:
    captures.after = 0
    x, y = inputs(0)
    with torch.no_grad():
        captures("f", function, x, y)
    captures("f", function, x.detach(), y)
    assert not tapes


def test_what_cannot_be_recorded_is_computed(captures: Captures, capsys: pytest.CaptureFixture[str]) -> None:
    captures.after = 0

    def waits(x: Tensor, y: Tensor) -> Tensor:
        return x.sum() * y if x.sum() > -1e9 else y

    given = inputs(0)
    for _ in range(3):
        assert torch.equal(captures("f", waits, *given), waits(*given))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "steps take longer: operation not permitted" in out


# --- in the towers


def make_clip(captures: Captures | None, frozen: bool = True) -> CLIP:
    torch.manual_seed(0)
    clip = CLIP(SHAPE).eval().requires_grad_(not frozen)
    clip.captures = captures
    return clip


@pytest.mark.parametrize("images", [0, 2], ids=["one prefix", "a prefix for each image"])
def test_text_tower(captures: Captures, tapes: list[Tape], images: int) -> None:
    lengths, plain, captured = (3, 1, 4), make_clip(None), make_clip(captures)
    for step in range(5):
        shape = [images, 5] if images else [5]
        prefix = (0.3 * random(*shape, 128, seed=step)).requires_grad_()
        suffix, deep = 0.3 * random(3, 6, 128, seed=1), (0.3 * random(2, 128, seed=9 + step)).requires_grad_()
        both = []
        for clip in (captured, plain):
            features = clip.encode_prompts(prefix, suffix, lengths, [deep])
            both.append([features.detach(), *gradients(features, [prefix, deep])])
        assert_equal(*both)
    assert tapes[0].replays == 2 * 3


def test_image_tower(captures: Captures, tapes: list[Tape]) -> None:
    plain, captured = make_clip(None), make_clip(captures)
    for step in range(5):
        images = random(2, 3, 32, 32, seed=step)
        first, deep = ((0.3 * random(2, 128, seed=10 * step + i)).requires_grad_() for i in (1, 2))
        both = []
        for clip in (captured, plain):
            features = clip.encode_image(images, first, [deep])
            both.append([features.detach(), *gradients(features, [first, deep])])
        assert_equal(*both)
    assert tapes[0].replays == 2 * 3


def test_towers_that_learn_are_not_recorded(captures: Captures, tapes: list[Tape]) -> None:
    captures.after = 0
    clip = make_clip(captures, frozen=False)
    clip.encode_prompts(random(5, 128).requires_grad_(), random(2, 3, 128), (2, 3)).sum().backward()
    clip.encode_image(random(1, 3, 32, 32), random(2, 128).requires_grad_()).sum().backward()
    assert not tapes and clip.text_projection.grad is not None
