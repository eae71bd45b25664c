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


def test_captions_are_true_of_the_pictures_that_show_what_they_name(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = script.Words(tree(tmp_path))
    photos = script.photographs(tmp_path / "tiny-imagenet-200", words, tmp_path / "photographs.npy")
    monkeypatch.setattr(script, "STAGES", [script.Stage(1, 64, 32, 1e-3, of=1)])
    pairs = script.Pairs(photos, words, seed=1)
    images, tokens, classes, true = pairs[0]
    assert images.shape == (64, 64, 64, 3) and tokens.shape[0] == true.shape[1] == 32
    assert true.diagonal().all()  # each of its own picture
    dogs = [words.wnids.index(wnid) for wnid in script.kinds()["dog"]]
    concept = [names[0] for names in words.words].index("dog")
    assert words.true_of[concept].nonzero()[0].tolist() == sorted(dogs)
    assert torch.equal(pairs[0][1], tokens)


def test_resumed_equals_unbroken(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tree(tmp_path)
    stages = script.Stage(3, 8, 4, 1e-3, of=4, half=2), script.Stage(2, 4, 4, 1e-3, of=2, crop=0.6)
    stages += (script.Stage(1, 8, 8, 1e-3, of=1, text_alone=True),)
    monkeypatch.setattr(script, "STAGES", stages)

    def train(name: str, stop: int = 0) -> bytes:
        work, out = tmp_path / name, tmp_path / name / "photo.pt.gz"
        flags = ["--root", root, "--work-dir", work, "--out", out, "--save-every", 16]
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


@pytest.mark.slow
def test_zero_shot_on_validation_photographs(script: ModuleType) -> None:
    """The figures of docs/tiny_photo.md. It needs Tiny ImageNet in the folder data. Last run on 2026-11-28."""
    root = REPOSITORY / "data" / "tiny-imagenet-200"
    if not root.is_dir():
        pytest.skip(f"no Tiny ImageNet at {root}")
    words = script.Words(root)
    scores = script.zero_shot(load_backbone("tiny-photo").state_dict(), words, *script.validation(root, words))
    table = (REPOSITORY / "docs" / "tiny_photo.md").read_text()
    assert scores["top-1"] >= 0.35 and f"| {100 * scores['top-1']:.1f} % |" in table
    assert f"| {100 * scores['place mean']:.1f} % |" in table
