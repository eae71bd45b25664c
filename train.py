"""The ecosystem's command line: ``python train.py --trainer CoOpOOD --config-file configs/...``."""

import sys

try:
    from oodprompt.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"error: the package {error.name!r} is not installed; run `pip install -e .` in this folder first")

if __name__ == "__main__":
    sys.exit(main())
