"""Prompts packed into one row against OpenAI's text tower on each prompt alone, all positions computed."""

from __future__ import annotations

import random as python_random
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from oodprompt.backbones import CLIP, CLIPShape, model
from oodprompt.backbones.packing import WAYS, Packing, pack, way_of
from tests.helpers.clip_checks import assert_same, is_text, is_text_but_tokens, pair, random, random_tokens, run

SHAPE = CLIPShape(48, 40, 3, 128, 8, 32, 100, 128, 2, 4)  # two heads, and as many blocks as tell first, next and last
LENGTHS = {
    "equal": (3, 3, 3),
    "different": (4, 1, 6, 2),
    "mixed": (3, 7, 3, 1, 7, 3),
    "one class": (5,),
    "two equal classes": (2, 2),
}
UNLIMITED = 1 << 60

Inputs = dict[str, Tensor]
# prefix, suffix, lengths, deep -> features
Encode = Callable[[Tensor, Tensor, tuple[int, ...], Sequence[Tensor]], Tensor]


@pytest.fixture
def towers(openai: ModuleType) -> tuple[CLIP, nn.Module]:
    return pair(openai, SHAPE)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way in which the tower attends."""
    monkeypatch.setattr(model, "way_of", lambda *_: request.param)
    return request.param


def no_weights(name: str) -> bool:
    return False


def make_inputs(prefix: int, lengths: tuple[int, ...], layers: int = 0, n_deep: int = 0, images: int = 0) -> Inputs:
    """Leaves "prefix", "suffix" (one column longer than any class needs), "deep 1", ... up to ``layers``."""
    inputs = {
        "prefix": random(*([images] if images else []), prefix, SHAPE.text_width, seed=1),
        "suffix": random(len(lengths), max(lengths) + 1, SHAPE.text_width, seed=2),
        **{f"deep {i}": random(n_deep, SHAPE.text_width, seed=10 + i) for i in range(1, layers + 1)},
    }
    return {name: (0.3 * value).requires_grad_() for name, value in inputs.items()}


def reference_prompts(
    model: nn.Module, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...], deep: Sequence[Tensor]
) -> Tensor:
    """``encode_prompts`` as MaPLe and CoCoOp do it: every image and class on its own, padded to the context length."""
    if prefix.ndim == 3:
        return torch.stack([reference_prompts(model, each, suffix, lengths, deep) for each in prefix])
    features = []
    for own, length in zip(suffix, lengths, strict=True):
        x = torch.cat([prefix, own[:length]])
        end = len(x) - 1
        x = F.pad(x, (0, 0, 0, len(model.positional_embedding) - len(x))) + model.positional_embedding
        x = x.unsqueeze(1)
        for i, block in enumerate(model.transformer.resblocks):
            if 0 < i <= len(deep):
                prompts = deep[i - 1].unsqueeze(1)
                x = torch.cat([x[:1], prompts, x[1 + len(prompts) :]])
            x = block(x)
        features.append(model.ln_final(x)[end, 0] @ model.text_projection)
    return torch.stack(features)


def theirs_encode(theirs: nn.Module) -> Encode:
    return lambda *inputs: reference_prompts(theirs, *inputs)


def results(
    encode: Encode,
    model: nn.Module,
    inputs: Inputs,
    lengths: tuple[int, ...],
    tower: Callable[[str], bool] = no_weights,
) -> dict[str, Tensor]:
    """Features, and gradients of all inputs that can have one and of the tower's parameters."""
    deep = [value for name, value in inputs.items() if name.startswith("deep")]
    features = encode(inputs["prefix"], inputs["suffix"], lengths, deep)
    return run(features, model, tower, **{k: v for k, v in inputs.items() if v.requires_grad and v.numel()})


def watch_block(clip: CLIP, index: int = 0) -> list[torch.Size]:
    """The list that will hold the shape of the input of each call of a block of the text tower."""
    seen: list[torch.Size] = []
    clip.transformer.resblocks[index].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    return seen


# --- encode_prompts


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("prefix", [0, 1, 5, 17])
def test_a_shared_prefix(prefix: int, lengths: tuple[int, ...], way: str, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    inputs = make_inputs(prefix, lengths)
    result = results(ours.encode_prompts, ours, inputs, lengths)
    assert result["features"].shape == (len(lengths), SHAPE.embed_dim)
    assert_same(result, results(theirs_encode(theirs), theirs, inputs, lengths))
    for row, length in zip(result["suffix"], lengths, strict=True):
        assert row[:length].abs().amax(dim=1).all() and not row[length:].any()


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("n_deep", [3, 6], ids=["frozen words follow", "all of the prefix"])
@pytest.mark.parametrize("layers", [1, 3, 6], ids=["one block", "all blocks", "more than there are"])
def test_deep_prompts(layers: int, n_deep: int, images: int, towers: tuple[CLIP, nn.Module]) -> None:
    """Block 0 has no deep prompts; prompts for blocks that do not exist are never looked at (NaN)."""
    ours, theirs = towers
    lengths, blocks = LENGTHS["mixed"], SHAPE.text_layers
    inputs = make_inputs(7, lengths, layers, n_deep, images)
    for i in range(blocks, layers + 1):
        inputs[f"deep {i}"] = torch.full((n_deep, SHAPE.text_width), torch.nan)
    result = results(ours.encode_prompts, ours, inputs, lengths)
    assert len([name for name in result if name.startswith("deep")]) == min(layers, blocks - 1)
    assert_same(result, results(theirs_encode(theirs), theirs, inputs, lengths))


@pytest.mark.parametrize("n_deep", [0, 2])
def test_a_prefix_for_each_image(n_deep: int, way: str, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    lengths = LENGTHS["different"]
    inputs = make_inputs(5, lengths, layers=min(n_deep, 1), n_deep=n_deep, images=3)
    result = results(ours.encode_prompts, ours, inputs, lengths)
    assert result["features"].shape == (3, len(lengths), SHAPE.embed_dim)
    assert_same(result, results(theirs_encode(theirs), theirs, inputs, lengths))


@pytest.mark.parametrize("images", [0, 2])
def test_gradients_of_the_weights(images: int, way: str, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    lengths = LENGTHS["mixed"]
    inputs = make_inputs(5, lengths, layers=2, n_deep=2, images=images)
    result = results(ours.encode_prompts, ours, inputs, lengths, is_text_but_tokens)
    assert "transformer.resblocks.3.attn.in_proj_weight" in result and "positional_embedding" in result
    assert_same(result, results(theirs_encode(theirs), theirs, inputs, lengths, is_text_but_tokens))


@pytest.mark.parametrize("limit", [1, UNLIMITED], ids=["in parts", "at once"])
def test_frozen_weights_get_no_gradient(limit: int, towers: tuple[CLIP, nn.Module]) -> None:
    ours, _ = towers
    ours.requires_grad_(False).activation_limit = limit
    inputs, lengths = make_inputs(5, (2, 4), layers=1, n_deep=2), (2, 4)
    ours.encode_prompts(inputs["prefix"], inputs["suffix"], lengths, [inputs["deep 1"]]).sum().backward()
    assert all(parameter.grad is None for parameter in ours.parameters())
    assert all(value.grad is not None and value.grad.any() for value in inputs.values())


@pytest.mark.parametrize("limit", [1, UNLIMITED], ids=["in parts", "at once"])
def test_bf16_is_close_to_fp32(limit: int, towers: tuple[CLIP, nn.Module]) -> None:
    """Within 5 %, and no further away than three times the plain tower's own bf16.

    bf16 rounds to 2^-9 = 0.2 %. A value passes through about eight roundings in each of four blocks: 32 errors of
    0.2 %, added as random numbers, make 0.2 % * sqrt(32) = 1.1 %; the worst of some hundred entries is at two
    to three times that, here and in the plain tower (measured: 1.4 to 2.5 %).
    """
    ours, theirs = towers
    ours.activation_limit = limit
    lengths = LENGTHS["mixed"]
    inputs = make_inputs(5, lengths, layers=2, n_deep=2, images=2)
    exact = results(ours.encode_prompts, ours, inputs, lengths)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results(ours.encode_prompts, ours, inputs, lengths)
        plain = results(theirs_encode(theirs), theirs, inputs, lengths)
    assert rounded["features"].dtype == torch.bfloat16
    for name, expected in exact.items():
        ours_off, plain_off = ((x[name] - expected).abs().max() / expected.abs().max() for x in (rounded, plain))
        print(f"{name}: {ours_off:.4f}, plain {plain_off:.4f}")
        assert 0 < ours_off < min(0.05, 3 * plain_off), name


@pytest.mark.parametrize("limit", [1, UNLIMITED], ids=["in parts", "at once"])
def test_padding_does_not_matter(limit: int, way: str, towers: tuple[CLIP, nn.Module]) -> None:
    ours, _ = towers
    ours.activation_limit = limit
    lengths = LENGTHS["mixed"]
    inputs = make_inputs(5, lengths, layers=2, n_deep=2)
    expected = results(ours.encode_prompts, ours, inputs, lengths)
    padded = inputs["suffix"].detach().clone()
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = torch.nan
    result = results(ours.encode_prompts, ours, {**inputs, "suffix": padded.requires_grad_()}, lengths)
    for name, value in expected.items():
        assert value.isfinite().all() and torch.equal(result[name], value), name


def test_deep_prompts_must_lie_in_the_prefix(towers: tuple[CLIP, nn.Module]) -> None:
    ours, _ = towers
    suffix, fits, long = torch.zeros(2, 3, SHAPE.text_width), *(torch.zeros(n, SHAPE.text_width) for n in (3, 4))
    for prefix in (torch.zeros(4, SHAPE.text_width), torch.zeros(6, 4, SHAPE.text_width)):
        ours.encode_prompts(prefix, suffix, (3, 2), [fits, fits])
        for deep in ([long], [fits, long]):
            with pytest.raises(ValueError, match="prefix"):
                ours.encode_prompts(prefix, suffix, (3, 2), deep)


# --- in parts


@pytest.mark.parametrize("images", [0, 9])
def test_parts_equal_the_whole(images: int, towers: tuple[CLIP, nn.Module]) -> None:
    """From limits that allow nothing to one that allows everything: features, gradients, and what is recomputed."""
    ours, _ = towers
    lengths, tower = LENGTHS["different"], no_weights if images else is_text_but_tokens
    prefix, everything = 4, (images or 1) * sum(LENGTHS["different"])
    inputs = make_inputs(prefix, lengths, layers=2, n_deep=2, images=images)
    whole = (images or 1, prefix + sum(lengths), SHAPE.text_width)
    seen = watch_block(ours)
    ours.activation_limit = UNLIMITED
    expected = results(ours.encode_prompts, ours, inputs, lengths, tower)
    assert seen == [whole]
    kinds = set()
    for limit in (1, *(1 << exponent for exponent in range(17, 24, 2))):
        ours.activation_limit = limit
        seen.clear()
        with torch.no_grad():
            ours.encode_prompts(inputs["prefix"], inputs["suffix"], lengths, [inputs["deep 1"], inputs["deep 2"]])
        calls_without_gradient = len(seen)
        seen.clear()
        assert_same(results(ours.encode_prompts, ours, inputs, lengths, tower), expected)
        if seen == [whole]:
            kinds.add("whole")
            assert calls_without_gradient == 1
            continue
        # Each part is computed in the forward pass and once more in the backward pass.
        half = len(seen) // 2
        assert sorted(seen[:half]) == sorted(seen[half:])
        assert calls_without_gradient <= half
        kinds.add("parts of classes" if seen[0][1] < whole[1] else "parts of images")
        assert (max(shape[0] for shape in seen) < whole[0]) == (images > 0)
        # Nothing but the prefix is computed more often than once.
        assert sum(shape[0] * (shape[1] - prefix) for shape in seen[:half]) == everything
    assert kinds == {"whole", "parts of classes", *(["parts of images"] if images else [])}


@pytest.mark.parametrize("images", [0, 2])
def test_nothing_is_recomputed_without_gradients(
    images: int, towers: tuple[CLIP, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, _ = towers
    lengths = LENGTHS["mixed"]
    inputs = make_inputs(4, lengths, layers=1, n_deep=2, images=images)
    frozen = {name: value.detach() for name, value in inputs.items()}
    expected = ours.encode_prompts(frozen["prefix"], frozen["suffix"], lengths, [frozen["deep 1"]])

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr(model, "checkpoint", refuse)
    ours.requires_grad_(False).activation_limit = 1
    seen = watch_block(ours)
    with torch.no_grad():
        features = ours.encode_prompts(inputs["prefix"], inputs["suffix"], lengths, [inputs["deep 1"]])
    assert len(seen) == (images or 1) * len(lengths)
    assert (features - expected).abs().max() < 1e-5 * expected.abs().max()
    features = ours.encode_prompts(frozen["prefix"], frozen["suffix"], lengths, [frozen["deep 1"]])
    assert features.grad_fn is None
    for learned in inputs:
        some = {**frozen, learned: inputs[learned]}
        with pytest.raises(AssertionError, match="checkpointed"):
            ours.encode_prompts(some["prefix"], some["suffix"], lengths, [some["deep 1"]])


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators made and that are still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def free(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        existing = {x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage not in existing and storage not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out


@pytest.mark.parametrize("images", [0, 6])
def test_memory_stays_within_the_limit(images: int, towers: tuple[CLIP, nn.Module]) -> None:
    """What is alive at most, in forward and backward pass together, where frozen weights encode learned prompts."""
    ours, _ = towers
    ours.requires_grad_(False)
    lengths = (6,) * (6 if images else 24)
    inputs = make_inputs(5, lengths, images=images)

    def kept_and_peak(limit: int) -> tuple[int, int]:
        ours.activation_limit = limit
        with LiveMemory() as memory:
            features = ours.encode_prompts(inputs["prefix"], inputs["suffix"], lengths)
            kept = memory.now
            torch.autograd.grad(features.sum(), inputs["prefix"])
        return kept, memory.peak

    whole, _ = kept_and_peak(UNLIMITED)
    assert whole > 20 * (images or 1) * sum(lengths) * SHAPE.text_width * SHAPE.text_layers
    for limit in (whole // 2, whole // 8):
        kept, peak = kept_and_peak(limit)
        print(f"whole {whole}, limit {limit}: kept {kept}, peak {peak}")
        assert kept < 0.02 * whole and peak < limit


# --- pack and attend


def draws(n: int) -> list[tuple[int, tuple[int, ...]]]:
    """Random prefixes and lengths, the smallest ones always among them."""
    source = python_random.Random(3)
    some = [(source.randrange(7), tuple(source.randint(1, 6) for _ in range(source.randint(1, 9)))) for _ in range(n)]
    return [(0, (1,)), (0, (1, 1, 1)), (1, (1, 1)), (2, (4,)), *some]


def test_every_suffix_token_has_one_place() -> None:
    for prefix, lengths in draws(200):
        packing = pack(prefix, lengths, torch.device("cpu"))
        longest, classes = max(lengths), len(lengths)
        places = {int(index): prefix + i for i, index in enumerate(packing.suffix_index)}
        assert len(packing.suffix_index) == sum(lengths) == len(places)
        assert places.keys() == {c * longest + t for c, length in enumerate(lengths) for t in range(length)}
        assert packing.positions.tolist() == [
            *range(prefix),
            *(prefix + int(index) % longest for index in packing.suffix_index),
        ]
        assert sorted(packing.class_order.tolist()) == list(range(classes))
        for c, length in enumerate(lengths):
            assert packing.ends[packing.class_order[c]] == places[c * longest + length - 1]
        # The buckets are the row behind the prefix, from left to right, each length once.
        assert len({length for _, _, length in packing.buckets}) == len(packing.buckets)
        at = prefix
        for first, several, length in packing.buckets:
            assert first == at and several == lengths.count(length)
            for start in range(first, first + several * length, length):
                c = int(packing.suffix_index[start - prefix]) // longest
                assert [places[c * longest + t] for t in range(length)] == list(range(start, start + length))
            at += several * length
        assert at == prefix + sum(lengths)


def masked_attention(packing: Packing, lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every token looks at the prefix and at its own class, up to itself; nobody looks at what fills up."""
    longest, real = max(lengths), real_tokens(packing, lengths)
    owner = torch.cat([torch.full((packing.prefix,), -1), packing.suffix_index // longest])
    same_or_prefix = (owner.unsqueeze(1) == owner) | (owner == -1)
    visible = same_or_prefix & (packing.positions <= packing.positions.unsqueeze(1)) & real
    visible |= torch.eye(len(real), dtype=torch.bool)
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~visible, -torch.inf)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("way", WAYS)
def test_attend_equals_masked_attention(way: str) -> None:
    """In double precision, so that 1e-12 is far above the rounding; outputs and gradients, all rows and the ends."""
    for seed, (prefix, lengths) in enumerate(draws(40)):
        packing = pack(prefix, lengths, torch.device("cpu"), way)
        tokens = len(packing.positions)
        q, k, v = (random(2, 3, tokens, 5, seed=3 * seed + i).double().requires_grad_() for i in range(3))
        real = real_tokens(packing, lengths)
        expected = masked_attention(packing, lengths, q, k, v)
        for rows in (slice(None), packing.ends):
            result = packing.attend(q[:, :, rows], k, v)
            counts = real if isinstance(rows, slice) else torch.ones(len(lengths), dtype=torch.bool)
            assert result.isfinite().all()
            assert (result - expected[:, :, rows])[:, :, counts].abs().max() < 1e-12
            weight = random(*result.shape, seed=seed).double() * counts.unsqueeze(1)
            gradients, wanted = (
                torch.autograd.grad((y * weight).sum(), (q, k, v), retain_graph=True)
                for y in (result, expected[:, :, rows])
            )
            for ours, theirs in zip(gradients, wanted, strict=True):
                assert (ours - theirs).abs().max() < 1e-12
                assert not ours[:, :, ~real].any(), "what fills up takes no part"


def real_tokens(packing: Packing, lengths: tuple[int, ...]) -> Tensor:
    """Which tokens of the row are not there to fill it up, [P + T]."""
    real = torch.zeros(len(packing.positions), dtype=torch.bool)
    real[: packing.prefix] = True
    for c, length in enumerate(lengths):
        end = int(packing.ends[packing.class_order[c]])
        real[end + 1 - length : end + 1] = True
    assert int(real.sum()) == packing.prefix + sum(lengths)
    return real


def test_few_kernels_where_they_are_queued() -> None:
    """On a GPU one masked attention, by class where the row is so long that this would cost more than the layers."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [way_of(cpu, n, 512) for n in (10, 10_000)] == ["buckets"] * 2
    assert [way_of(gpu, n, 512) for n in (10, 1024, 1025)] == ["row", "row", "classes"]
    lengths = (4, 1, 6, 2)
    with CountsAttention() as seen:
        for each in ("row", "classes"):
            packing = pack(5, lengths, cpu, each)
            q = random(1, 2, len(packing.positions), 8)
            packing.attend(q, q, q)
    assert seen.calls == 1 + 2


class CountsAttention(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


# --- encode_text


def continued(tokens: Tensor) -> Tensor:
    """The second prompt is the first one, and more."""
    tokens[1, :6] = tokens[0, :6]
    return tokens


def begun_alike(tokens: Tensor) -> Tensor:
    tokens[:, :9] = tokens[0, :9]
    return tokens


TEXTS: dict[str, tuple[list[int], Callable[[Tensor], Tensor], int]] = {  # ends, change, tokens that are shared
    "long common beginning": ([11, 10, 14, 10], begun_alike, 9),
    "one continues the other": ([6, 9], continued, 6),
    "identical": ([8] * 3, lambda tokens: tokens[:1].repeat(3, 1), 8),
    "identical, of full length": ([31] * 2, lambda tokens: tokens[:1].repeat(2, 1), 31),
    "a single one": ([7], lambda tokens: tokens, 7),
    "only the start of text": ([3, 31, 5], lambda tokens: tokens, 1),
    "no word": ([1, 4], lambda tokens: tokens, 1),
}


@pytest.mark.parametrize("text", TEXTS)
def test_encode_text(text: str, towers: tuple[CLIP, nn.Module]) -> None:
    ours, theirs = towers
    ends, change, shared = TEXTS[text]
    tokens = change(random_tokens(SHAPE, ends))
    seen = watch_block(ours)
    both = [run(model.encode_text(tokens), model, is_text) for model in (ours, theirs)]
    assert seen == [(1, shared + sum(end + 1 - shared for end in ends), SHAPE.text_width)]
    assert_same(*both)


# --- cost


@pytest.mark.parametrize("images", [0, 3])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_only_what_matters_is_computed(lengths: tuple[int, ...], images: int, towers: tuple[CLIP, nn.Module]) -> None:
    """P + sum(lengths) positions go through the blocks, and in the last one C of them through the MLP."""
    ours, _ = towers
    positions = []
    for block in ours.transformer.resblocks:
        block.mlp.register_forward_pre_hook(lambda _, inputs: positions.append(inputs[0].shape[:2].numel()))
    inputs = make_inputs(5, lengths, images=images)
    ours.encode_prompts(inputs["prefix"], inputs["suffix"], lengths)
    each = [5 + sum(lengths)] * (SHAPE.text_layers - 1) + [len(lengths)]
    assert positions == [(images or 1) * n for n in each]


def test_a_packing_made_in_inference_mode_serves_training(openai: ModuleType) -> None:
    ours, _ = pair(openai, SHAPE)
    prefix, suffix, lengths = random(3, SHAPE.text_width), random(2, 3, SHAPE.text_width), (3, 2)
    pack.cache_clear()
    with torch.inference_mode():
        ours.encode_prompts(prefix, suffix, lengths)
    ours.encode_prompts(prefix.requires_grad_(), suffix, lengths).sum().backward()
    assert prefix.grad is not None
