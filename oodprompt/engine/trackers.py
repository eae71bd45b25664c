"""Where the curves of a training also go: TensorBoard, Weights & Biases, MLflow. A tracker that fails ends no run."""

from __future__ import annotations

import importlib.util
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from oodprompt.config.keys import leaves
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import optional

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_PROJECT = "oodprompt"


def check_trackers(cfg: CfgNode) -> None:
    """``UserError`` where the package of a tracker is missing."""
    for name in cfg.TRAIN.TRACKERS:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"TRAIN.TRACKERS {name}: the package {name} is not installed; pip install 'oodprompt[{name}]', or leave it out"
            )


class Trackers:
    """The trackers of TRAIN.TRACKERS for the run in ``folder`` (None: no tracker). They start with the first value.

    ``purge_step``: the first step that a resumed run does again. Each failure is said in one line, and ends that tracker.
    """

    def __init__(self, cfg: CfgNode, folder: Path | None, purge_step: int | None) -> None:
        self._all: list[_Tracker] = []
        if folder is not None:
            for name in dict.fromkeys(cfg.TRAIN.TRACKERS):
                own = name == "tensorboard"
                kind = _TensorBoard(folder, purge_step) if own else _OfAccelerate(name, cfg, folder, purge_step)
                self._all.append(kind)

    def write(self, tag: str, value: float, step: int) -> None:
        """Add a value to the curve ``tag``."""
        for tracker in self._all:
            tracker.write(tag, value, step)

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()


class _Tracker:
    """Starts with its first value; after a failure it takes no more."""

    title = ""

    def __init__(self) -> None:
        self._writer: Any = None
        self._works = True

    def start(self) -> Any:
        """What values are written with."""
        raise NotImplementedError

    def add(self, tag: str, value: float, step: int) -> None:
        raise NotImplementedError

    def end(self) -> None:
        raise NotImplementedError

    def write(self, tag: str, value: float, step: int) -> None:
        if not self._works:
            return
        self._works = False  # unless it does
        if self._writer is None:
            with optional(self.title):
                self._writer = self.start()
        if self._writer is not None:
            with optional(f"the rest of {self.title}"):
                self.add(tag, value, step)
                self._works = True

    def close(self) -> None:
        if self._writer is not None:
            with optional(f"the end of {self.title}"):
                self.end()
            self._writer = None


class _NoTraceback:
    """The hook for errors in threads while TensorBoard writes in one, until ``end``; other errors go to the hook before.

    Of a full disk or the like the next write tells; a traceback would be printed too.
    """

    def __init__(self) -> None:
        self._before = threading.excepthook
        threading.excepthook = self

    def __call__(self, failed: threading.ExceptHookArgs) -> None:
        if not (failed.exc_type and issubclass(failed.exc_type, OSError)):
            self._before(failed)

    def end(self) -> None:
        if threading.excepthook is self:  # else it is that of a later run, which goes on
            threading.excepthook = self._before


class _TensorBoard(_Tracker):
    """The file of TensorBoard in the folder tensorboard of the run.

    torch's own writer is used, because accelerate's keeps steps that a resumed run writes a second time.
    """

    title = "TensorBoard's file"
    _writer: SummaryWriter

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        super().__init__()
        self._folder, self._purge_step = folder / "tensorboard", purge_step

    def start(self) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # here: the first step need not wait for it

        self._hook = _NoTraceback()
        try:
            return SummaryWriter(str(self._folder), purge_step=self._purge_step)
        except BaseException:
            self._hook.end()
            raise

    def add(self, tag: str, value: float, step: int) -> None:
        self._writer.add_scalar(tag, value, step)

    def end(self) -> None:
        try:
            self._writer.close()
        finally:
            self._hook.end()


class _OfAccelerate(_Tracker):
    """A tracker of accelerate, by its name. It is told the run's keys; its project is called oodprompt."""

    def __init__(self, name: str, cfg: CfgNode, folder: Path, purge_step: int | None) -> None:
        super().__init__()
        self._is_resumed = purge_step is not None
        self.title, self._name, self._cfg, self._folder = f"the record of {name}", name, cfg, folder

    def _options(self) -> dict[str, Any]:
        """Arguments of the tracker: the run's name, and for W&B an identity with which a resumed run goes on."""
        place = str(self._folder.resolve())
        known: dict[str, Callable[[], dict[str, Any]]] = {
            "wandb": lambda: {
                **{"run_name": _PROJECT, "name": str(self._folder), "dir": place, "resume": "allow"},
                "id": self._identity(),
            },
            "mlflow": lambda: {"experiment_name": _PROJECT, "run_name": str(self._folder)},
        }
        return known[self._name]()

    def _identity(self) -> str:
        """Drawn for a new run, and kept in its folder for those that resume it."""
        file = self._folder / "wandb.id"
        if self._is_resumed and file.is_file():
            return file.read_text(encoding="utf-8").strip()
        drawn = secrets.token_hex(8)  # of no seed: two runs of one seed are two runs
        write_atomically(file, f"{drawn}\n")
        return drawn

    def start(self) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        tracker = LOGGER_TYPE_TO_CLASS[self._name](**self._options())
        if hasattr(tracker, "start"):  # accelerate before 1.7 starts it at once
            tracker.start()
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in leaves(self._cfg).items()}
        tracker.store_init_configuration(plain)
        return tracker

    def add(self, tag: str, value: float, step: int) -> None:
        self._writer.log({tag: value}, step=step)

    def end(self) -> None:
        self._writer.finish()
