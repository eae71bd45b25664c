"""OODPrompt inside an installed Dassl: one line at the top of ``train.py`` of CoOp, MaPLe or any repository of their shape,

    import oodprompt.plugin

registers the trainers CoOpOOD, DebiasedPT and RaVL, our data sets under their names with OOD before them, and our config
keys, and mends what keeps Dassl from running on current PyTorch (``OODPROMPT_REPAIR=0``: leave it as it is). Without
touching the file: ``python -m oodprompt.plugin train.py ...``. See docs/plugin.md.

Importing this without Dassl raises ``DasslMissing``.
"""

# ruff: noqa: E402 (Dassl can be imported once it is found and mended)
from __future__ import annotations

import importlib.util
import os
import sys

from oodprompt.errors import UserError


class DasslMissing(UserError, ImportError):
    """Dassl is not installed."""


_spec = importlib.util.find_spec("dassl")
if _spec is None or _spec.origin is None:  # a mere folder of that name is none
    _error = DasslMissing(
        "oodprompt.plugin works inside Dassl, which is not installed: git clone "
        "https://github.com/KaiyangZhou/Dassl.pytorch && pip install --no-deps --no-build-isolation ./Dassl.pytorch "
        "(or put its folder on PYTHONPATH); our own train.py does not need it"
    )
    if sys.argv[:1] == ["-m"]:  # python -m oodprompt.plugin
        print(f"error: {_error}", file=sys.stderr)
        raise SystemExit(2)
    raise _error

from oodprompt.config.extensions import register_all
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.log import show_messages
from oodprompt.plugin.repair import repair_dassl

show_messages()

if os.environ.get("OODPROMPT_REPAIR", "1") != "0":
    repair_dassl()

from dassl.config import defaults

from oodprompt.plugin.adapters import register_adapter
from oodprompt.plugin.datasets import PREFIX, register_datasets
from oodprompt.plugin.keys import extend_cfg
from oodprompt.plugin.tiny import offer_tiny
from oodprompt.plugin.trainers import register_debiaser

register_all()
extend_cfg(defaults._C)
for _name, _trainer in TRAINER_REGISTRY.items():
    # Of ours the three that are no one else's; of others (OODPROMPT_IMPORT, installed packages) all.
    _ours = _trainer.__module__.startswith("oodprompt.")
    if _trainer.debiaser_class and (_name in ("CoOpOOD", "DebiasedPT", "RaVL") or not _ours):
        register_debiaser(_name)
register_datasets()
offer_tiny()

__all__ = ["PREFIX", "DasslMissing", "extend_cfg", "register_adapter", "register_debiaser", "repair_dassl"]
