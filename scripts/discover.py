"""What does a trained model go by? RaVL's discovery on the run in a folder: ``python scripts/discover.py --model-dir RUN``.

Regions of labelled validation images are clustered by the run's own image features; the clusters whose presence moves its
accuracy and decides its errors are shown in RUN/discovery.html (a page with pictures), discovery.png, discovery.md and
discovery.json. Other runs take them by DISCOVERY.FROM RUN: --trainer RaVL, TRAINER.COOPOOD.ANCHOR regions, and
TRAINER.GROUPS regions of methods that take groups.

KEY VALUE pairs change keys, as REGIONS.GRID "(3, 3)" or REGIONS.SOURCE boxes REGIONS.FILE boxes.csv; all are in
docs/config.md under REGIONS and DISCOVERY.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from oodprompt.config import extensions
from oodprompt.log import show_messages
from oodprompt.terminal import Parser, exit_status


def run(argv: list[str] | None = None) -> None:
    show_messages()
    parser = Parser(description=__doc__)
    parser.add_argument("--model-dir", type=Path, required=True, help="output folder of a run")
    parser.add_argument("--load-epoch", type=int, help="epoch to look at; else the best model, else the last")
    parser.add_argument("--output-dir", type=Path, help="where to write; default: the run's folder")
    parser.add_argument("--root", help="folder that holds the data sets, where it is not the run's")
    extensions.add_flag(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, e.g. REGIONS.GRID '(3, 3)'")
    args = parser.parse_intermixed_args(argv)
    extensions.add(args.imports)

    from oodprompt.engine import load_run
    from oodprompt.reports.results import method_title

    out = args.output_dir or args.model_dir
    trainer = load_run(args.model_dir, args.load_epoch, args.opts, root=args.root, output_dir=str(out))
    cfg = trainer.cfg
    title = method_title({"trainer": cfg.TRAINER.NAME, "base": trainer.base_name, "stack": cfg.TRAINER.STACK})
    trainer.discovery.discover(trainer.learner, trainer.objective.predict, title, out)


if __name__ == "__main__":
    # Read by OpenMP when torch is first imported: see oodprompt.cli.main.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(exit_status(run))
