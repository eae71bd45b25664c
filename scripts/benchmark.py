"""Train many runs and tabulate them: ``python scripts/benchmark.py GRID.yaml``, or a grid by flags (see --help)."""

import os
import sys

# Read when NumPy and PyTorch are imported, below: threads that wait sleep; processes, not threads, share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from oodprompt.runs.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
