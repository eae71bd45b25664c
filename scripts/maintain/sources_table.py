"""The tables of docs/groups.md: how good the groups of every source are, and what debiasers make of them.

    python scripts/maintain/sources_table.py --seeds 1 2 3
    python scripts/maintain/sources_table.py --sweep
    python scripts/maintain/sources_table.py --data photos --root DATA

GroupDRO and DebiasedPT over CoOp train with every source on ShapesOnScenes, on the embedded ``tiny``, or on
PhotosOnPlaces (dogs and cats on reefs and mountains), on ``tiny-photo``. With ``--methods CoOpOOD``, CoOpOOD is
anchored on every source. Each seed sets both the run and the images. A run that is finished is not run again.
``--sweep`` trains first models only. It shows the quality of groups for values of the sources' keys, on the training
images of other seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oodprompt import cli
from oodprompt.engine.trainer import build_trainer
from oodprompt.methods.quality import group_quality
from oodprompt.reports.results import finished_results
from oodprompt.reports.style import markdown_table

# Config file, the prefix of the data set's keys with the name of its seed, and further keys.
_PLACES = ("DATASET.PHOTOS.PLACES", "('reef', 'mountain')")
DATA = {
    "shapes": ("configs/trainers/DebiasedPT/tiny_shapes.yaml", "DATASET.SHAPES", "RENDER_SEED", ()),
    "photos": ("configs/trainers/CoOpOOD/tiny_photos.yaml", "DATASET.PHOTOS", "BUILD_SEED", _PLACES),
}
# With the keys of docs/sweeps/debiasers.md.
METHODS = {
    "GroupDRO": ("TRAINER.GROUPDRO.ADJUSTMENT", "1"),
    "DebiasedPT": ("TRAINER.DEBIASEDPT.ETA", "20"),
    "CoOpOOD": (
        *("TRAINER.COOPOOD.ANCHOR", "groups", "TRAINER.COOPOOD.ANCHOR_START", "erased"),
        *("TRAINER.COOPOOD.ANCHOR_LR", "0.0001"),
    ),
}
_SSA = "TRAINER.GROUP_SOURCES.SSA"
SOURCES: dict[str, tuple[str, ...]] = {
    "true": (),
    "pseudo": (),
    "denoised": (),
    "audit": (),
    "regions": (),
    "ssa": (),
    "ssa, 1 % of the labels": (f"{_SSA}.SHARE", "0.01"),
    "errors": (),
    "eiil": (),
    "spare": (),
    "clusters": (),
}
SWEEP = {
    "errors": ("ERRORS.FIRST_EPOCHS", (5, 20, 50)),
    "spare": ("SPARE.FIRST_EPOCHS", (1, 5, 20, 50)),
    "clusters": ("CLUSTERS.COMPONENTS", (1, 2, 5, 10)),
    "ssa": ("SSA.SHARE", (0.01, 0.02, 0.05)),
}
Row = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """The data set of all runs, with the folder that holds it, and the folder of the runs."""

    name: str
    root: Path
    strength: float
    out: Path

    def arguments(self, folder: Path, trainer: str, seed: int, *keys: str) -> list[str]:
        """The command line of a run."""
        config, prefix, of_images, more = DATA[self.name]
        images = (f"{prefix}.CORRELATION", str(self.strength), f"{prefix}.{of_images}", str(seed))
        where = ("--output-dir", str(folder), "--root", str(self.root), "--seed", str(seed))
        return ["--trainer", trainer, "--config-file", config, *where, *images, *more, "TRAIN.VAL_FREQ", "0", *keys]


def trained(images: Images, trainer: str, source: str, seed: int) -> Row:
    """The results of a run. A run that is not finished is trained first."""
    name = f"{images.strength:g}" if images.name == "shapes" else f"{images.name}-{images.strength:g}"
    folder = images.out / name / trainer / source.replace(" ", "_").replace("%", "percent") / str(seed)
    if (found := finished_results(folder)) is None:
        keys = ("TRAINER.GROUPS", source.split(",")[0], *SOURCES[source], *METHODS[trainer]) if source else ()
        cli.run(images.arguments(folder, trainer, seed, *keys))
        found = finished_results(folder)
    assert found is not None, "a run that ends has results"
    return found


def _mean(values: Sequence[float | None], scale: float = 100, digits: int = 1) -> str:
    known = [scale * value for value in values if value is not None]
    if not known:
        return ""
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}"


def _quality(rows: Sequence[Row]) -> list[str]:
    """Mean quality of the groups of runs, as cells; empty for attribute labels, which agree with themselves."""
    quality = [row["group_quality"]["train"] for row in rows if "group_quality" in row]
    keys = (("agreement", 100.0, 1), ("worst_group_agreement", 100.0, 1), ("adjusted_mutual_information", 1.0, 2))
    return [_mean([q[key] for q in quality], scale, digits) for key, scale, digits in keys]


def table(images: Images, seeds: Sequence[int], sources: Sequence[str], methods: Sequence[str]) -> str:
    """A line for each source: the quality of its groups, and accuracies of every method, in per cent."""
    lines = []
    plain = [trained(images, "CoOp", "", seed) for seed in seeds]
    cells = [_mean([row[key] for row in plain]) for key in ("worst_group_accuracy", "accuracy")]
    lines.append(["none (CoOp)", "", "", "", *cells * len(methods)])
    for source in sources:
        runs = {name: [trained(images, name, source, seed) for seed in seeds] for name in methods}
        cells = [
            _mean([r[key] for r in rows]) for rows in runs.values() for key in ("worst_group_accuracy", "accuracy")
        ]
        lines.append([f"`{source}`" if "," not in source else source, *_quality(runs[methods[0]]), *cells])
    header = ["groups by", "agree", "worst group agrees", "AMI"]
    return markdown_table(
        header + [f"{name}, {what}" for name in methods for what in ("worst group", "average")], lines
    )


def swept(images: Images, seeds: Sequence[int]) -> Iterator[list[str]]:
    """A line for each source and value of its key: the quality of its groups."""
    for source, (key, values) in SWEEP.items():
        for value in values:
            rows: list[Row] = []
            for seed in seeds:
                keys = ("TRAINER.GROUPS", source, f"TRAINER.GROUP_SOURCES.{key}", str(value), "VERBOSE", "False")
                arguments = images.arguments(images.out / "sweep", "GroupDRO", seed, *keys)
                trainer = build_trainer(cli.setup_cfg(cli.build_parser().parse_intermixed_args(arguments)))
                train = trainer.attributes.data.train
                found = group_quality(trainer.attributes.values(train), train.label, train.attribute)
                assert found is not None, "the data set has attribute labels"
                names = ("agreement", "worst_group_agreement", "adjusted_mutual_information", "num_groups")
                quality = {name: getattr(found, name) for name in names}
                rows.append({"group_quality": {"train": quality}})
            groups = statistics.mean(row["group_quality"]["train"]["num_groups"] for row in rows)
            yield [f"`{source}`", f"`{key}`", str(value), *_quality(rows), f"{groups:g}"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/sources_table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3; of --sweep: 101 102")
    parser.add_argument("--data", choices=DATA, default="shapes")
    parser.add_argument("--root", type=Path, help="folder that holds the data set; default: OUT/data")
    parser.add_argument("--correlation", type=float, default=0.95)
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES), metavar="SOURCE")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["GroupDRO", "DebiasedPT"])
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args(argv)
    images = Images(args.data, args.root or args.out / "data", args.correlation, args.out)
    if args.sweep:
        seeds = args.seeds if args.seeds != parser.get_default("seeds") else [101, 102]
        header = ["groups by", "key", "value", "agree", "worst group agrees", "AMI", "groups"]
        print(markdown_table(header, list(swept(images, seeds))))
    else:
        print(table(images, args.seeds, args.sources, args.methods))
    return 0


if __name__ == "__main__":
    sys.exit(main())
