"""What does a trained model go by? RaVL's discovery: ``python scripts/discover.py --model-dir RUN`` (see --help)."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is imported, below: see oodprompt.cli.main

from oodprompt.discovering import main

if __name__ == "__main__":
    sys.exit(main())
