"""Draw example images of every group of a data set, with how many images train, val and test hold.

    python scripts/maintain/dataset_picture.py --config-file configs/trainers/CoOpOOD/tiny_shapes.yaml --out shapes.png

Takes the flags and KEY VALUE pairs of train.py.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from matplotlib.figure import Figure

from oodprompt.data.dataset import DatasetBase, attribute_name, build_dataset
from oodprompt.data.images import PixelRules, read_image
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.reports.style import write_figure
from oodprompt.terminal import exit_status


def groups_picture(dataset: DatasetBase, examples: int = 6, rules: PixelRules = PixelRules()) -> Figure:
    """One row per group (class, attribute) with its first training images."""
    counts = [Counter((d.label, d.attribute) for d in split) for split in (dataset.train_x, dataset.val, dataset.test)]
    groups = sorted(set().union(*counts))
    figure = Figure(figsize=(2.6 + 1.1 * examples, 1.15 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), examples + 1, squeeze=False, width_ratios=[2.4, *[1] * examples])
    for row, (label, attribute) in zip(grid, groups, strict=True):
        train, val, test = (count[label, attribute] for count in counts)
        title = f"{dataset.classnames[label]} / {attribute_name(dataset, attribute)}"
        row[0].text(0, 0.5, f"{title}\n{train:,} train, {val:,} val, {test:,} test", va="center", fontsize=9)
        mine = [d for d in (*dataset.train_x, *dataset.test) if (d.label, d.attribute) == (label, attribute)]
        for axes, datum in zip(row[1:], mine, strict=False):
            axes.imshow(read_image(datum.impath, rules))
        for axes in row:
            axes.axis("off")
    return figure


def main() -> None:
    parser = build_parser()
    parser.prog, parser.description = "dataset_picture.py", __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", default="dataset.png", help="file to write")
    args = parser.parse_intermixed_args()
    args.trainer = args.trainer or "ZeroshotCLIP"
    cfg = setup_cfg(args)
    write_figure(groups_picture(build_dataset(cfg), rules=PixelRules.of(cfg)), args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
