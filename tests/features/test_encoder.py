"""What an encoder says of a split."""

from __future__ import annotations

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
