"""Classify images with a trained model: ``python scripts/predict.py --model-dir RUN IMAGE_OR_FOLDER ...`` (see --help)."""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when PyTorch is imported, below: see oodprompt.cli.main

from oodprompt.predict import main

if __name__ == "__main__":
    sys.exit(main())
