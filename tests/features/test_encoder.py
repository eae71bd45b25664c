"""What an encoder says of a split."""

from __future__ import annotations

from tests.helpers.runs import Build


def test_the_paths_of_a_split_are_those_of_its_labels(build: Build) -> None:
    """Also of a few-shot sample, which has an order of its own."""
    trainer = build("CoOp", "DATASET.NUM_SHOTS", 5)
    for name in ("train", "val", "test"):
        split, data = trainer.encoder.split(name), trainer.encoder.data_of(name)
        known = {datum.impath: datum.label for datum in data}
        paths = split.paths()
        assert [known[path] for path in paths] == split.label.tolist() and len(set(paths)) == len(data) > 0
