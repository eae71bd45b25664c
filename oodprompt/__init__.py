"""OODPrompt: any prompt learner with any debiaser, on CLIP, with worst-group accuracy reported.

    import oodprompt

    run = oodprompt.train("CoOpOOD", data="photos/", backbone="ViT-B/16", output="out/run1")
    run.evaluate().worst_group
    oodprompt.load("out/run1").predict(["new.jpg"])

docs/library.md has everything that can be called from Python.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oodprompt.auditing.run import audit
    from oodprompt.comparing import compare
    from oodprompt.data.feature_files import write_features
    from oodprompt.errors import UserError
    from oodprompt.library.results import Results
    from oodprompt.library.run import Run
    from oodprompt.library.running import load, train
    from oodprompt.serving import Classifier

__version__ = "0.1.0"

# In a checkout, `trainers/` and `datasets/` lie beside this folder; setup.py installs them as subpackages. With the
# checkout on this package's path, `oodprompt.trainers` means the same folder whichever way Python found us.
_checkout = Path(__file__).resolve().parent.parent
IS_CHECKOUT = (_checkout / "trainers" / "coop_ood.py").is_file()
if IS_CHECKOUT:
    __path__.append(str(_checkout))

# Imported when they are first asked for: they take PyTorch, for which ``oodprompt --help`` does not wait.
_PLACES = {
    "Classifier": "oodprompt.serving",
    "Results": "oodprompt.library.results",
    "Run": "oodprompt.library.run",
    "UserError": "oodprompt.errors",
    "audit": "oodprompt.auditing.run",
    "compare": "oodprompt.comparing",
    "load": "oodprompt.library.running",
    "train": "oodprompt.library.running",
    "write_features": "oodprompt.data.feature_files",
}

__all__ = ["Classifier", "Results", "Run", "UserError", "audit", "compare", "load", "train", "write_features"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _import_torch()
    return getattr(importlib.import_module(_PLACES[name]), name)


def _import_torch() -> None:
    """Import PyTorch so that its threads sleep while they wait, as on the command line (``oodprompt.cli.main``).

    OpenMP reads the variable when it is loaded; afterwards the environment is as it was.
    """
    name = "OMP_WAIT_POLICY"
    if "torch" in sys.modules or name in os.environ:
        return
    os.environ[name] = "passive"
    try:
        importlib.import_module("torch")
    finally:
        del os.environ[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
