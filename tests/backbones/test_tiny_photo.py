"""The training of the small CLIP of photographs, on a miniature of Tiny ImageNet's tree."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from oodprompt.backbones import load_backbone
from tests.helpers.runs import REPOSITORY, load_script
from tests.helpers.trees.tiny_imagenet import tree


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "scripts" / "maintain")
        module = load_script("scripts/maintain/train_tiny_photo.py")
    module.PER_CLASS = 1
    return module


def test_captions_are_true_of_the_pictures_that_show_what_they_name(script: ModuleType, tmp_path: Path) -> None:
    words = script.Words(tree(tmp_path))
    photos = script.photographs(tmp_path / "tiny-imagenet-200", words, tmp_path / "photographs.npy")
    pairs = script.Pairs(photos, words, seed=1, batch=64, steps=1)
    images, tokens, classes, true = pairs[0]
    assert images.shape == (64, 64, 64, 3) and tokens.shape[0] == true.shape[1] == 32
    assert true.diagonal().all()  # each of its own picture
    dogs = [words.wnids.index(wnid) for wnid in script.kinds()["dog"]]
    concept = [names[0] for names in words.words].index("dog")
    assert words.true_of[concept].nonzero()[0].tolist() == sorted(dogs)
    assert torch.equal(pairs[0][1], tokens)


def test_resumed_equals_unbroken(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path)

    def train(name: str, stop: int = 0) -> bytes:
        work, out = tmp_path / name, tmp_path / name / "photo.pt.gz"
        flags = ["--root", root, "--work-dir", work, "--out", out, "--samples", 32, "--batch", 8, "--save-every", 2]
        monkeypatch.setattr(sys, "argv", ["train", *map(str, flags), "--workers", "0"])
        if stop:
            scores, seen = script.zero_shot, []

            def killed(*args: object) -> dict[str, float]:
                seen.append(1)
                if len(seen) == stop:
                    raise KeyboardInterrupt
                return scores(*args)

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(script, "zero_shot", killed)
                script.main()
        script.main()
        return out.read_bytes()

    unbroken = train("unbroken")
    assert train("killed", stop=1) == unbroken
    model = load_backbone("tiny", tmp_path / "killed" / "photo.pt.gz")
    assert (model.shape.image_resolution, model.shape.vocab_size, model.shape.context_length) == (64, 49408, 77)
