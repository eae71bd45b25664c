"""Runs several command lines of ``train.py`` one after another in one process group; test_distributed starts it.

The only argument is a JSON file with a list of command lines. The first that fails is named and ends the processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.backends.backend_agg import FigureCanvasAgg

from oodprompt import cli
from oodprompt.data import distributed

if __name__ == "__main__":
    torch.set_num_threads(1)
    leave_together = distributed.leave_together
    distributed.leave_together = lambda: dist.barrier() if dist.is_initialized() else None  # the group is needed again
    FigureCanvasAgg.print_png = lambda canvas, file, **_: file.write(b"not drawn")  # drawing takes longer than training
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            cli.run(arguments)
        except Exception as error:
            name = arguments[arguments.index("--output-dir") + 1]
            raise SystemExit(f"failed: {name}: {type(error).__name__}: {error}") from error
    leave_together()
