"""A trained model as a file, and the classifier that reads it: ``export`` and ``Classifier``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oodprompt.serving.classifier import Classifier
    from oodprompt.serving.exporting import Report, export

# Imported when they are first asked for: they take PyTorch, for which --help does not wait.
_PLACES = {
    "Classifier": "oodprompt.serving.classifier",
    "Report": "oodprompt.serving.exporting",
    "export": "oodprompt.serving.exporting",
}

__all__ = ["Classifier", "Report", "export"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
