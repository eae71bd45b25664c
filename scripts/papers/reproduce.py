"""What the scripts beside it call: ``python scripts/papers/reproduce.py DATASET DATA`` (see --help)."""

import os
import sys
from pathlib import Path

# NumPy and PyTorch read these when they are imported below. Waiting threads sleep; processes share the cores, not
# threads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from oodprompt.studies.papers import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent))
