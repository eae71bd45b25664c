"""What an encoder says of a split, and how it reads images."""

from __future__ import annotations

import multiprocessing

import pytest

from oodprompt.data.loading import Loader
from tests.helpers.runs import Build


def test_the_paths_of_a_split_are_in_the_order_of_its_labels(build: Build) -> None:
    """Also of a few-shot sample, which has an order of its own."""
    trainer = build("CoOp", "DATASET.NUM_SHOTS", 5)
    for name in ("train", "val", "test"):
        split, data = trainer.encoder.split(name), trainer.encoder.data_of(name)
        assert list(split.paths()) == [datum.impath for datum in data]
        assert split.label.tolist() == [datum.label for datum in data]
    sample = list(trainer.encoder.split("train").paths())
    assert sample != sorted(sample)  # else this test could not tell one order from the other


@pytest.mark.parametrize(
    ("trainer", "keys", "lasting"),
    [
        ("VPT", (), ["train", "val"]),
        ("CoOp", (), []),
        ("CoOp", ("INPUT.TRANSFORMS", "('random_flip', 'normalize')"), ["train"]),
        ("CoOp", ("DATALOADER.FEATURE_CACHE", "off"), ["train", "val"]),
    ],
)
def test_workers_that_read_every_epoch_start_once_and_none_is_left(
    trainer: str, keys: tuple[str, ...], lasting: list[str], build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Loader, bool]] = []
    source = Loader._source
    monkeypatch.setattr(Loader, "_source", lambda self: (started.append((self, self._lasts)), source(self))[1])
    more = ("DATALOADER.NUM_WORKERS", 1, "OPTIM.MAX_EPOCH", 3, "TEST.FINAL_MODEL", "best_val", "TEST.NO_TEST", True)
    done = build(trainer, "DATASET.SHAPES.NUM_TRAIN", 16, "DATASET.SHAPES.NUM_VAL", 8, *more, *keys)
    done.train()
    assert not multiprocessing.active_children()
    loaders = {"train": done.train_loader_x, "val": done.val_loader}
    assert [name for name, loader in loaders.items() if (loader, True) in started] == lasting
    assert sum(lasts for _, lasts in started) == len(lasting)


@pytest.mark.parametrize("name", ["CoOp", "CoCoOp", "MaPLe"])
def test_no_images_are_encoded_as_one_and_give_no_rows(
    name: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a last batch that is smaller than the number of processes, some get none."""
    trainer = build(name)
    encoder, learner = trainer.encoder, trainer.learner
    seen, encode, forward = [], learner.encode_image, learner.forward
    monkeypatch.setattr(learner, "encode_image", lambda images: seen.append(len(images)) or encode(images))
    monkeypatch.setattr(learner, "forward", lambda z: seen.append(len(z)) or forward(z))
    batch = {key: value[:0] for key, value in next(iter(trainer.test_loader)).items()}
    learner.train()
    alignment = encoder.align(batch)
    assert seen == [1, 1] and alignment.logits.shape == (0, 2) and encoder.encode_frozen(batch["img"]).shape == (0, 128)
    (alignment.image_features.sum() + alignment.logits.sum() + 0 * alignment.text_features.sum()).backward()
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
