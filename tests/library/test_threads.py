"""How PyTorch's threads wait after ``import oodprompt``."""

from __future__ import annotations

import os
import subprocess
import sys


def test_threads_that_wait_sleep() -> None:
    """Else a few milliseconds of work take a hundred times as long as soon as another program uses a core."""
    code = "import os, oodprompt; oodprompt.Run; assert 'OMP_WAIT_POLICY' not in os.environ"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    shown = subprocess.run(
        [sys.executable, "-c", code], env=environment | {"OMP_DISPLAY_ENV": "true"}, capture_output=True, text=True
    )
    assert shown.returncode == 0, shown.stderr
    policy = [line for line in shown.stderr.splitlines() if "OMP_WAIT_POLICY" in line]
    assert policy and all("PASSIVE" in line for line in policy), shown.stderr
