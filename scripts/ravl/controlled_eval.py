"""RaVL's controlled evaluation on planted correlations: ``python scripts/ravl/controlled_eval.py --root DIGITS`` (see --help)."""

import os
import sys

# Read when NumPy and PyTorch are imported, below: threads that wait sleep; processes, not threads, share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from oodprompt.studies.controlled import main

if __name__ == "__main__":
    sys.exit(main())
