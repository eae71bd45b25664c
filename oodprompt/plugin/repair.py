"""What keeps Dassl (last changed in 2022) from running on current PyTorch and numpy, mended at run time.

Nothing is written into Dassl's files. ``MENDERS`` has one entry for each breakage that ``oodprompt.doctor`` knows; each
does nothing where that Dassl is not broken.
"""

from __future__ import annotations

import codecs
import importlib
import importlib.util
import inspect
import pickle
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import torch
from torch.optim import Optimizer, lr_scheduler
from torch.torch_version import TorchVersion

from oodprompt.backbones.tensors import TensorsOnly, pickle_module
from oodprompt.errors import UserError


def repair_dassl() -> list[str]:
    """Mend what is broken; returns the names of what was mended in this call. Again: nothing.

    Called by ``import oodprompt.plugin`` unless ``OODPROMPT_REPAIR`` is 0. Missing packages can only be stood in for
    before ``dassl.data`` is imported, so the import belongs at the top of ``train.py``.
    """
    return [name for name, mend in MENDERS.items() if mend()]


class _With:
    """A module as some other module sees it: with ``replaced`` names, else itself."""

    def __init__(self, module: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _is_missing(package: str) -> bool:
    return package not in sys.modules and importlib.util.find_spec(package) is None


def _stand_in(name: str, doc: str) -> ModuleType:
    module = ModuleType(name, doc)
    module.__spec__ = ModuleSpec(name, None)  # without one, others who ask whether it is there would get an error
    sys.modules[name] = module
    return module


def _stand_in_for_wilds() -> bool:
    """Dassl imports wilds (and pandas) for three data sets whether they are used or not: leave those three out."""
    name = "dassl.data.datasets.dg.wilds"
    if name in sys.modules or not (_is_missing("wilds") or _is_missing("pandas")):
        return False
    _stand_in(name, "Empty: the package wilds or pandas is not installed.")
    return True


def _stand_in_for_gdown() -> bool:
    """Dassl imports gdown at the top for downloads of data sets that hardly anyone starts."""
    if not _is_missing("gdown"):
        return False

    def download(*args: Any, **kwargs: Any) -> NoReturn:
        raise UserError("this data set downloads itself with gdown, which is not installed: pip install gdown")

    module: Any = _stand_in("gdown", "Stands in for a package that is not installed.")
    module.download = download
    return True


def _mend_scheduler() -> bool:
    """Warm-up schedulers pass ``verbose``, which PyTorch's no longer take: every config with a warm-up epoch stops."""
    module = importlib.import_module("dassl.optim.lr_scheduler")
    warmup, base = module._BaseWarmupScheduler, lr_scheduler.LRScheduler
    if "verbose" in inspect.signature(base.__init__).parameters or hasattr(warmup, "_mended"):
        return False

    def __init__(
        self: Any, optimizer: Optimizer, successor: Any, warmup_epoch: int, last_epoch: int = -1, verbose: bool = False
    ) -> None:
        self.successor, self.warmup_epoch = successor, warmup_epoch
        base.__init__(self, optimizer, last_epoch)

    warmup.__init__, warmup._mended = __init__, True
    return True


def _mend_load_checkpoint() -> bool:
    """``torch.load`` takes tensors alone by default, and Dassl's files hold a scheduler (with warm-up) and numpy scalars.

    These are loaded, so that a run resumes; whatever else a file holds is left out, and no code of a file is run.
    ``val_result``, which a last-step checkpoint leaves empty, becomes NaN, which ``TrainerBase.load_model`` can print.
    """
    module: Any = importlib.import_module("dassl.utils.torchtools")
    if isinstance(module.torch, _With) or TorchVersion(torch.__version__) < TorchVersion("2.6"):
        return False
    module.torch = _With(torch, load=_load)
    return True


def _allowed() -> dict[tuple[str, str], Any]:
    """What Dassl's own checkpoints hold beside tensors and plain values: schedulers, optimisers, numpy scalars."""
    parts = [*vars(torch.optim).values(), *vars(lr_scheduler).values()]
    kinds = (Optimizer, lr_scheduler.LRScheduler)
    classes = [part for part in parts if inspect.isclass(part) and issubclass(part, kinds)]
    scalar = np.float64(0).__reduce__()[0]
    found = {(part.__module__, part.__qualname__): part for part in [*classes, dict, defaultdict, np.dtype]}
    numpys = {(f"numpy.{core}.multiarray", "scalar"): scalar for core in ("core", "_core")}
    return {**found, **numpys, ("_codecs", "encode"): codecs.encode}


class _DasslUnpickler(TensorsOnly):
    """Also what ``_allowed`` names."""

    def find_class(self, module: str, name: str) -> Any:
        return _allowed().get((module, name)) or super().find_class(module, name)


def _load(path: Any, map_location: Any = None, **kwargs: Any) -> dict[str, Any]:
    try:  # first, as this refuses archives of TorchScript, which would be run
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        state = torch.load(
            path, map_location=map_location, weights_only=False, pickle_module=pickle_module(_DasslUnpickler)
        )
    if isinstance(state, dict) and "state_dict" in state and state.get("val_result") is None:
        state["val_result"] = float("nan")
    return state


def _mend_numpy_names() -> bool:
    """``np.int`` left numpy in 1.24; two transforms use it."""
    mended = False
    for name in ("dassl.data.transforms.randaugment", "dassl.data.transforms.autoaugment"):
        module: Any = importlib.import_module(name)
        if not hasattr(np, "int") and not isinstance(module.np, _With):
            module.np, mended = _With(np, int=int, float=float, bool=bool), True
    return mended


MENDERS: dict[str, Callable[[], bool]] = {
    "wilds": _stand_in_for_wilds,
    "gdown": _stand_in_for_gdown,
    "warm-up": _mend_scheduler,
    "checkpoints": _mend_load_checkpoint,
    "numpy names": _mend_numpy_names,
}
