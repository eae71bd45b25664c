"""The command that classifies images with a trained model (``scripts/predict.py``)."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from oodprompt.config import extensions
from oodprompt.data.dataset import told_apart
from oodprompt.data.images import IMAGE_SUFFIXES
from oodprompt.engine.trainer import load_run
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import show_messages
from oodprompt.terminal import Parser, exit_status

DESCRIPTION = """Classify images with a trained model: ``python scripts/predict.py --model-dir RUN --output predictions.csv IMAGE_OR_FOLDER ...``.

Folders are searched with all folders in them. The csv file has one row per image: its path, the class, its probability, and the
probability of every class. The run's data set must be there, for the names of its classes and what its debiaser was built from.
"""


def images_of(places: Sequence[Path]) -> list[Path]:
    """The files that are given, and the images in folders, in sorted order; ``UserError`` for what is not there."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            inside = sorted(p for p in place.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not inside:
                raise UserError(f"no image in {place}; images end in {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"there is no file or folder {place}")
    return list(dict.fromkeys(found))


def predictions_csv(paths: Sequence[Path], names: Sequence[str], probabilities: Tensor) -> str:
    """A row per image: path, class, its probability, and ``probabilities`` [N, C] of all classes, with four digits."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["image", "prediction", "probability", *names])
    for path, row in zip(paths, probabilities.tolist(), strict=True):
        best = max(range(len(names)), key=row.__getitem__)
        writer.writerow([path, names[best], f"{row[best]:.4f}", *(f"{value:.4f}" for value in row)])
    return table.getvalue()


def run(argv: Sequence[str] | None = None) -> None:
    """Classify images and write the csv file."""
    show_messages()
    parser = Parser(prog="predict.py", description=DESCRIPTION)
    parser.add_argument("--model-dir", type=Path, required=True, help="output folder of a run")
    parser.add_argument("--load-epoch", type=int, help="epoch whose model is taken; else the best model, else the last")
    parser.add_argument("--root", help="folder that holds the data sets, where it is not the run's")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="csv file that is written")
    extensions.add_flag(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    args = parser.parse_args(argv)
    extensions.add(args.imports)
    paths = images_of(args.images)

    trainer = load_run(args.model_dir, args.load_epoch, root=args.root)
    names, probabilities = told_apart(trainer.dataset.classnames), trainer.classify(paths)
    write_atomically(args.output, predictions_csv(paths, names, probabilities))
    counts = ", ".join(
        f"{int(n)} {name}"
        for name, n in zip(names, probabilities.argmax(1).bincount(minlength=len(names)), strict=True)
        if n
    )
    print(f"{len(paths)} images: {counts}\nWrote {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
