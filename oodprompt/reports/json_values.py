"""What reports write as JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any


def json_value(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays and tuples as lists, paths as text, numbers that are not finite as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
