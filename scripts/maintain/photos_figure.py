"""Draw docs/photos_on_places.png: test images of PhotosOnPlaces, places as rows and animals as columns.

    python scripts/maintain/photos_figure.py --root ROOT

ROOT holds Tiny ImageNet's folder. KEY VALUE pairs of DATASET.PHOTOS choose other animals and places.
"""

from __future__ import annotations

import argparse
import sys

from matplotlib.figure import Figure

from oodprompt.config.keys import check_values, get_cfg_default, set_key
from oodprompt.data.dataset import DatasetBase, build_dataset
from oodprompt.data.images import PixelRules, read_image
from oodprompt.reports.style import write_figure
from oodprompt.terminal import Parser, exit_status


def photos_figure(dataset: DatasetBase, rules: PixelRules, examples: int = 4) -> Figure:
    """The first ``examples`` test images of every group, side by side; a row per place and a heading per class."""
    names, places = dataset.classnames, dataset.attribute_names
    columns = len(names) * examples
    figure = Figure(figsize=(0.3 + 0.9 * columns, 0.3 + 0.9 * len(places)), dpi=72)  # 0.9 inches: 65 pixels
    grid = figure.add_gridspec(
        len(places), columns, left=0.3 / figure.get_figwidth(), right=1, bottom=0,
        top=1 - 0.3 / figure.get_figheight(), wspace=0.03, hspace=0.03,
    )  # fmt: skip
    for a, place in enumerate(places):
        for y, name in enumerate(names):
            mine = [d for d in dataset.test if (d.label, d.attribute) == (y, a)]
            for i, datum in enumerate(mine[:examples]):
                axes = figure.add_subplot(grid[a, y * examples + i])
                axes.imshow(read_image(datum.impath, rules), interpolation="bilinear")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if not i and not y:
                    axes.set_ylabel(place, fontsize=10)
                if not i and not a:
                    axes.set_title(name, fontsize=10, loc="left", pad=4)
    return figure


def main() -> None:
    parser = Parser(prog="photos_figure.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of the data sets")
    parser.add_argument("--out", default="docs/photos_on_places.png", help="file to write")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, as DATASET.PHOTOS.SIZE 96")
    args = parser.parse_args()
    cfg = get_cfg_default()
    cfg.DATASET.ROOT, cfg.DATASET.NAME = args.root, "PhotosOnPlaces"
    for key, value in zip(args.opts[::2], args.opts[1::2], strict=True):
        set_key(cfg, key, value, "the command line")
    check_values(cfg)
    write_figure(photos_figure(build_dataset(cfg), PixelRules.of(cfg)), args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    sys.exit(exit_status(main))
