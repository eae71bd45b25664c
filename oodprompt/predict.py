"""The command that classifies images with a trained model (``scripts/predict.py``)."""

from __future__ import annotations

import argparse
import csv
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from oodprompt.config import extensions
from oodprompt.data.dataset import told_apart
from oodprompt.data.folders import IMAGE_ENDINGS, images_below, note_passed_over
from oodprompt.engine.trainer import load_run
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import progress, show_messages
from oodprompt.serving.classifier import AT_ONCE, Classifier
from oodprompt.terminal import Parser, exit_status, program

DESCRIPTION = """Classify images with a trained model: oodprompt predict --model-dir RUN --output predictions.csv IMAGE_OR_FOLDER ....

Folders are searched with all folders in them, but for hidden files and folders. The csv file has one row per image: its path, the
class, its probability, and the probability of every class. Where some file is no image that can be read, a last column ``error``
says why, its row has no prediction, and the exit status is 1. With --model-dir the run's data set must be there, for the names of its classes and what its debiaser was built from.
With --model-file nothing of the run is needed.
"""


def images_of(places: Sequence[Path]) -> list[Path]:
    """The files that are given, and the images in folders, in sorted order; ``UserError`` for what is not there."""
    found: list[Path] = []
    passed_over: Counter[str] = Counter()
    for place in places:
        if place.is_dir():
            inside = images_below(place, passed_over)
            if not inside:
                raise UserError(f"no image in {place}; {IMAGE_ENDINGS}")
            found += inside
        elif place.is_file():
            found.append(place)
        else:
            raise UserError(f"there is no file or folder {place}")
    note_passed_over(passed_over, "the folders given")
    return found


def _line(cells: Iterable[Any]) -> str:
    table = io.StringIO()
    csv.writer(table, lineterminator="").writerow(cells)
    return table.getvalue()


class Predictions:
    """Rows of the csv file, in the order of ``paths``: path, class, its probability, that of all classes, four digits each.

    The column ``error`` is there where some image could not be read, whose row has nothing else.
    """

    def __init__(self, paths: Sequence[Path], names: Sequence[str]) -> None:
        self.paths, self.names = paths, names
        self.counts: Counter[str] = Counter()
        self.errors: dict[int, str] = {}
        self._rows: dict[int, str] = {}

    def add(self, places: Sequence[int], probabilities: Sequence[Sequence[float]], errors: dict[int, str]) -> None:
        """Rows of a batch: places in ``paths``, ``probabilities`` [n, C] of theirs, and what ails other images by place."""
        self.errors |= errors
        for i, row in zip(places, probabilities, strict=True):
            best = max(range(len(self.names)), key=row.__getitem__)
            self.counts[self.names[best]] += 1
            self._rows[i] = _line(
                [self.paths[i], self.names[best], f"{row[best]:.4f}", *(f"{value:.4f}" for value in row)]
            )

    def csv(self) -> str:
        """The content of the file."""
        last = ["error"] if self.errors else []
        lines = [_line(["image", "prediction", "probability", *self.names, *last])]
        for i, path in enumerate(self.paths):
            if i in self.errors:
                lines.append(_line([path, "", "", *("" for _ in self.names), self.errors[i]]))
            else:
                lines.append(self._rows[i] + ("," if last else ""))
        return "\n".join(lines) + "\n"

    def summary(self, most: int = 20) -> str:
        """What was found, and the images that could not be read, in lines."""
        counts = ", ".join(f"{self.counts[name]} {name}" for name in self.names if self.counts[name])
        read = f"{len(self._rows)} images" + (f": {counts}" if counts else "")
        if not self.errors:
            return read
        listed = [f"  {text}" for text in list(self.errors.values())[:most]]
        more = [f"  and {len(self.errors) - most} more, in the column error"] if len(self.errors) > most else []
        return "\n".join([read, f"{len(self.errors)} files could not be read and have no prediction:", *listed, *more])


def build_parser() -> Parser:
    parser = Parser(prog=program("scripts/predict.py", "predict"), description=DESCRIPTION)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model-dir", type=Path, help="output folder of a run")
    model.add_argument("--model-file", type=Path, help="file of `oodprompt export`")
    parser.add_argument("--backbone-path", help="checkpoint of the backbone of --model-file, where it has moved")
    parser.add_argument("--load-epoch", type=int, help="epoch whose model is taken; else the best model, else the last")
    parser.add_argument("--root", help="folder that holds the data sets, where it is not the run's")
    parser.add_argument("--batch-size", type=int, help="images at once, where it is not the run's")
    parser.add_argument("--output", type=Path, default=Path("predictions.csv"), help="csv file that is written")
    extensions.add_flag(parser)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    return parser


def run(argv: Sequence[str] | None = None) -> int:
    """Classify images and write the csv file; returns 1 where some of them could not be read, else 0."""
    show_messages()
    args = build_parser().parse_args(argv)
    extensions.add(args.imports)
    paths = list(dict.fromkeys(images_of(args.images)))  # a row for each file

    if args.backbone_path and args.model_file is None:
        raise UserError("--backbone-path goes with --model-file; a run names its backbone in its config.yaml")
    if args.model_file is not None:
        names, batches = _by_file(args, paths)
    else:
        keys = [] if args.batch_size is None else ["DATALOADER.TEST.BATCH_SIZE", str(args.batch_size)]
        trainer = load_run(args.model_dir, args.load_epoch, keys, root=args.root)
        names, batches = told_apart(trainer.dataset.classnames), trainer.testing.classify_readable(paths)
    found = Predictions(paths, names)
    for places, probabilities, errors in batches:
        found.add(places, probabilities.tolist(), errors)
    write_atomically(args.output, found.csv())
    print(f"{found.summary()}\nWrote {args.output}")
    return 1 if found.errors else 0


def _by_file(args: argparse.Namespace, paths: Sequence[Path]) -> tuple[list[str], Iterator[Any]]:
    """The names of the classes and batches of predictions of an exported model."""
    unused = {"--root": args.root, "--load-epoch": args.load_epoch}
    if given := [flag for flag, value in unused.items() if value is not None]:
        raise UserError(f"{given[0]} goes with --model-dir; a model file has no data set and one epoch")
    size = AT_ONCE if args.batch_size is None else args.batch_size
    classifier = Classifier.load(args.model_file, args.backbone_path or "")
    batches = classifier.by_batch(paths, size)
    total = -(-len(paths) // max(size, 1))
    return classifier.classnames, progress.over(batches, "Images", "batch", total)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
