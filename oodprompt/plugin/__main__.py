"""``python -m oodprompt.plugin train.py ...``: a script of a Dassl-based repository, with the plugin and no edit."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from oodprompt.errors import UserError
from oodprompt.terminal import exit_status


def run() -> None:
    """Run the script that ``sys.argv[1]`` names as ``python`` would, its folder first on the path."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        raise UserError("give the script to run: python -m oodprompt.plugin train.py --trainer CoOpOOD ...")
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.exit(exit_status(run))
