"""``oodprompt audit``: what would go wrong with my data, or does with my model, as a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oodprompt.config import extensions
from oodprompt.config.keys import get_cfg_default, merge_file, pairs_of
from oodprompt.errors import UserError
from oodprompt.log import show_messages
from oodprompt.terminal import Parser, exit_status, logged, program

DESCRIPTION = """Look for shortcuts by name: words whose presence in the training images goes with their labels.

oodprompt audit --root PHOTOS --backbone ViT-B/16     a folder, with zero-shot CLIP
oodprompt audit --model-dir RUN                       a trained model and its data

OUTPUT_DIR/audit.html is a page with the suspects, the accuracy with and without them, and the next command. audit.json holds
the same for programs. train.yaml is the config of the next command.
"""


def build_parser() -> Parser:
    parser = Parser(prog=program("", "audit"), description=DESCRIPTION)
    parser.add_argument("--root", help="folder of the images, or that holds the data sets (DATASET.ROOT)")
    parser.add_argument("--backbone", help="name of the CLIP (MODEL.BACKBONE.NAME)")
    parser.add_argument("--model-dir", help="output folder of a run, whose model and data are audited")
    parser.add_argument("--load-epoch", type=int, help="epoch to look at; else the best model, else the last")
    parser.add_argument("--output-dir", help="where to write; default: audit, or audit in the run's folder")
    parser.add_argument("--vocabulary", default="", help='file of words, or "captions"; default: the built-in words')
    parser.add_argument("--sensitive", action="store_true", help="look for words that describe people by group, too")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="",
        help="where accuracy is measured; default: val, else test",
    )
    parser.add_argument("--regions", action="store_true", help="discover shortcuts by region, too, which takes longer")
    parser.add_argument("--config-file", help="yaml file with config keys")
    parser.add_argument("--dataset-config-file", help="yaml file of the data set")
    extensions.add_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, as DATASET.NAME ShapesOnScenes")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Audit, and write what is found; raises ``UserError`` for what the user can mend."""
    show_messages()
    args = build_parser().parse_intermixed_args(argv)
    extensions.add(args.imports)
    keys: dict[str, Any] = dict(pairs_of(args.opts))
    files = (args.config_file, args.dataset_config_file)
    from oodprompt.auditing.run import (  # here: they take PyTorch
        Options,
        audit_data,
        audit_run,
        check_model_dir,
        folder_of,
    )

    if args.model_dir:
        check_model_dir(args.model_dir, args.backbone, files)
    folder = folder_of(args.output_dir, args.model_dir)
    options = Options(args.vocabulary, args.sensitive, args.split, args.regions)
    with logged(str(folder), 0):
        if args.model_dir:
            audit_run(args.model_dir, args.load_epoch, keys, args.root, folder, options)
        else:
            audit_data(_of_root(args.root, keys, files) | keys, args.backbone, files, folder, options)


def _of_root(root: str | None, keys: dict[str, Any], files: Sequence[str | None]) -> dict[str, Any]:
    """Keys of the folder: it holds the data set that is named, or it is one itself."""
    if root is None:
        return {}
    cfg = get_cfg_default()
    for file in filter(None, files):
        merge_file(cfg, file)
    if keys.get("DATASET.NAME") or cfg.DATASET.NAME:
        return {"DATASET.ROOT": root}
    from oodprompt.library.data import keys_of_data

    try:
        return keys_of_data(Path(root), None)
    except UserError as error:
        place = Path(root).absolute()
        what = "has no folders train and test, and no metadata.csv" if place.is_dir() else "is no folder"
        raise UserError(
            f"--root: {place} {what}; give a folder of train/CLASS/*.jpg and test/CLASS/*.jpg, or the folder of data sets "
            "with DATASET.NAME"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
