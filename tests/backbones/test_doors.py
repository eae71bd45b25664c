"""The embedded ``tiny`` through each door: by its name, as a folder of OpenCLIP, and as one of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.tokenizer import OpenAITokenizer
from oodprompt.engine.arguments import build_parser, setup_cfg
from tests.helpers.runs import CONFIG, METRICS, Run, weights
from tests.helpers.tiny_written import as_hugging_face, as_open_clip

TEXTS = [
    "a photo of a water bird.",
    "A  Photo\tof THE Bird's nest, 2 eggs & 10% of 3.5?",
    "naïve café — 水鳥 \U0001f600",
    "",
    "supercalifragilistic_expialidocious it's they'll",
]


@pytest.fixture(scope="module")
def doors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Kind of name -> a name of that kind, all of the same weights."""
    open_clip, padded_with_end, padded_with_0 = (tmp_path_factory.mktemp(name) for name in ("open_clip", "hf", "hf0"))
    as_open_clip(open_clip)
    as_hugging_face(padded_with_end)
    as_hugging_face(padded_with_0, pad="!")
    return {
        "open_clip": f"open_clip:{open_clip}",
        "hf": f"hf:{padded_with_end}",
        "hf padded with 0": f"hf:{padded_with_0}",
    }


@pytest.mark.parametrize("door", ["open_clip", "hf", "hf padded with 0"])
def test_the_backbone_is_tiny(door: str, doors: dict[str, str]) -> None:
    clip, tiny = load_backbone(doors[door]), load_backbone("tiny")
    assert type(clip) is CLIP and clip.shape == tiny.shape
    for name, value in tiny.state_dict().items():
        assert torch.equal(clip.state_dict()[name], value), name


@pytest.mark.parametrize("door", ["open_clip", "hf", "hf padded with 0"])
def test_the_ids_are_those_of_our_tokenizer(door: str, doors: dict[str, str]) -> None:
    """Behind the end of text padding differs where a tokenizer pads with that token.

    A tokenizer of transformers that pads with "!" takes a "!" in a text for padding too.
    """
    found, expected = load_backbone(doors[door]).tokenizer, OpenAITokenizer()
    ids, own = found(TEXTS), expected(TEXTS)
    if door == "hf":
        ids = torch.where(torch.arange(77) > own.argmax(1, keepdim=True), 0, ids)
    assert torch.equal(ids, own)
    assert torch.equal(found.ends(found(TEXTS)), expected.ends(own))
    assert [found.encode(text) for text in TEXTS] == [expected.encode(text) for text in TEXTS]
    long = "bird " * 75
    assert not found.is_too_long(long) and found.is_too_long(long + "s")
    assert torch.equal(found([long + "s"], truncate=True), expected([long + "s"], truncate=True))


@pytest.mark.parametrize("door", ["open_clip", "hf"])
def test_the_keys_of_pixels_are_those_of_tiny(door: str, doors: dict[str, str]) -> None:
    """Without a file that gives them; tiny's are in our own."""
    shared = ["--trainer", "CoOp", "DATASET.NAME", "ShapesOnScenes"]
    flags = ["--config-file", CONFIG, "--backbone", "tiny"], ["--backbone", doors[door]]
    own, taken = (setup_cfg(build_parser().parse_intermixed_args([*shared, *more])).INPUT for more in flags)
    assert tuple(own.SIZE) == tuple(taken.SIZE) and own.INTERPOLATION == taken.INTERPOLATION
    assert pytest.approx(taken.PIXEL_MEAN) == own.PIXEL_MEAN and pytest.approx(taken.PIXEL_STD) == own.PIXEL_STD


def test_square_images_are_the_same_however_they_are_resized(run: Run, tmp_path: Path) -> None:
    expected = run("CoOp", "shortest", "OPTIM.MAX_EPOCH", 1)
    for mode in ("squash", "longest"):
        result = run("CoOp", mode, "OPTIM.MAX_EPOCH", 1, "INPUT.RESIZE", mode)
        assert all(result[key] == expected[key] for key in METRICS)


@pytest.mark.parametrize(
    "words", [["CoOp"], ["MaPLe"], ["CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes"]], ids=lambda words: words[0]
)
def test_runs_give_the_results_of_tiny(words: list[str], doors: dict[str, str], run: Run, tmp_path: Path) -> None:
    more = [*words[1:], "OPTIM.MAX_EPOCH", 2]
    expected = run(words[0], "tiny", *more)
    for door, name in doors.items():
        result = run(words[0], door.replace(" ", "_"), *more, "--backbone", name)
        for key in ("accuracy", "worst_group_accuracy", "macro_f1", "adjusted_average_accuracy"):
            assert result[key] == pytest.approx(expected[key], abs=1e-4), (door, key)
        learned = weights(tmp_path / door.replace(" ", "_"), 2)
        for key, value in weights(tmp_path / "tiny", 2).items():
            if "token_suffix" not in key:  # it ends in padding, which plays no part
                assert torch.allclose(learned[key], value, atol=1e-4), (door, key)
