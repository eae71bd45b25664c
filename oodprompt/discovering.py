"""The command that looks for what a trained model wrongly goes by (``oodprompt discover``, ``scripts/discover.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oodprompt.config import extensions
from oodprompt.log import show_messages
from oodprompt.reports.results import method_title
from oodprompt.terminal import Parser, exit_status, program

if TYPE_CHECKING:
    from oodprompt.engine.trainer import PromptTrainer


DESCRIPTION = """What does a trained model go by? RaVL's discovery on the run in a folder: oodprompt discover --model-dir RUN.

Regions of labelled validation images are clustered by the run's own image features; the clusters whose presence moves its
accuracy and decides its errors are shown in RUN/discovery.html (a page with pictures), discovery.png, discovery.md and
discovery.json. Other runs take them by DISCOVERY.FROM RUN: --trainer RaVL, TRAINER.COOPOOD.ANCHOR regions, and
TRAINER.GROUPS regions of methods that take groups.

KEY VALUE pairs change keys, as REGIONS.GRID "(3, 3)" or REGIONS.SOURCE boxes REGIONS.FILE boxes.csv; all are in
docs/config.md under REGIONS and DISCOVERY.
"""


def build_parser() -> Parser:
    parser = Parser(prog=program("scripts/discover.py", "discover"), description=DESCRIPTION)
    parser.add_argument("--model-dir", type=Path, required=True, help="output folder of a run")
    parser.add_argument("--load-epoch", type=int, help="epoch to look at; else the best model, else the last")
    parser.add_argument("--output-dir", type=Path, help="where to write; default: the run's folder")
    parser.add_argument("--root", help="folder that holds the data sets, where it is not the run's")
    extensions.add_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, e.g. REGIONS.GRID '(3, 3)'")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """Look at a run and write what is found."""
    show_messages()
    args = build_parser().parse_intermixed_args(argv)
    extensions.add(args.imports)

    from oodprompt.engine import load_run

    trainer = load_run(
        args.model_dir, args.load_epoch, args.opts, root=args.root, output_dir=str(args.output_dir or args.model_dir)
    )
    discover_in(trainer, args.output_dir or args.model_dir)


def discover_in(trainer: PromptTrainer, folder: Path) -> None:
    """Discovery in a trained model; the files go to ``folder``."""
    title = method_title(
        {"trainer": trainer.cfg.TRAINER.NAME, "base": trainer.base_name, "stack": trainer.cfg.TRAINER.STACK}
    )
    trainer.discovery.discover(trainer.learner, trainer.objective.predict, title, folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))
