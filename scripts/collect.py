"""Tables over seeds from a folder of outputs: ``python scripts/collect.py DIR [NAME ...]`` (see --help)."""

import sys

from oodprompt.runs.collect import main

if __name__ == "__main__":
    sys.exit(main())
