"""``python -m oodprompt.doctor [--root DIR]``: what is installed, what is found, what is wrong and what to do about it.

Exit status 0 when a run is possible (the embedded CLIP loads and gives finite features), else 1.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import inspect
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import oodprompt
from oodprompt.errors import UserError
from oodprompt.terminal import Parser, exit_status

if TYPE_CHECKING:  # they take PyTorch, whose absence the doctor reports
    from yacs.config import CfgNode

    from oodprompt.data.dataset import DatasetBase

_SECONDS = 3.0  # for reading data sets, again for looking at their images, and again for digests of weights
_LOW_GIB = 2.0
_PACKAGES = ("torch", "torchvision", "numpy", "scikit-learn", "accelerate", "kmedoids", "yacs", "clip-anytorch")

# What a section has to say: lines, and what is wrong with what to do.
Section = tuple[list[str], list[str]]


# --- Dassl -----------------------------------------------------------------------------------------------------


def _lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _warm_up_stops(folder: Path) -> bool:
    from torch.optim.lr_scheduler import LRScheduler

    passes = re.search(
        r"super\(\).__init__\(\s*optimizer,\s*last_epoch,\s*verbose", _text(folder / "optim/lr_scheduler.py")
    )
    return bool(passes) and "verbose" not in inspect.signature(LRScheduler.__init__).parameters


def _checkpoints_stop(folder: Path) -> bool:
    import torch
    from torch.torch_version import TorchVersion

    text = _text(folder / "utils/torchtools.py")
    return (
        TorchVersion(torch.__version__) >= TorchVersion("2.6") and "torch.load(" in text and "weights_only" not in text
    )


def _numpy_names_stop(folder: Path) -> bool:
    import numpy as np

    files = [folder / f"data/transforms/{name}.py" for name in ("randaugment", "autoaugment")]
    return not hasattr(np, "int") and any(re.search(r"\bnp\.(int|float|bool)\b", _text(file)) for file in files)


# What keeps Dassl from running on current PyTorch: name -> (what happens, whether Dassl in that folder has it, seen from its
# files alone). ``oodprompt.plugin.repair`` mends each at run time.
BREAKAGES: dict[str, tuple[str, Callable[[Path], bool]]] = {
    "wilds": (
        "imports wilds and pandas, of which one is not installed, for three data sets",
        lambda folder: (folder / "data/datasets/dg/wilds").is_dir() and (_lacks("wilds") or _lacks("pandas")),
    ),
    "gdown": (
        "imports gdown, which is not installed",
        lambda folder: "import gdown" in _text(folder / "data/datasets/base_dataset.py") and _lacks("gdown"),
    ),
    "warm-up": ("every config with a warm-up epoch stops: LRScheduler takes no 'verbose' any more", _warm_up_stops),
    "checkpoints": ("its own checkpoints do not load: torch.load takes tensors alone by default", _checkpoints_stop),
    "numpy names": ("randaugment and autoaugment stop: numpy has no np.int any more", _numpy_names_stop),
}


def dassl_breakages(folder: Path) -> dict[str, str]:
    """What is broken in the Dassl in ``folder`` (the package's) with the packages installed here: name -> what happens."""
    return {name: what for name, (what, has) in BREAKAGES.items() if has(folder)}


def dassl() -> Section:
    """Where Dassl is, which, and what is broken in it. It is not needed but for ``oodprompt.plugin``."""
    spec = importlib.util.find_spec("dassl")
    if spec is None or spec.origin is None:
        return ["not found; only oodprompt.plugin, inside CoOp or MaPLe checkouts, needs it"], []
    folder = Path(spec.origin).parent
    version = re.search(r'__version__ = "(.+)"', _text(folder / "__init__.py"))
    lines = [f"{version.group(1) if version else 'unknown version'} in {folder}"]
    broken = dassl_breakages(folder)
    lines += [f"{name}: {what}" for name, what in broken.items()]
    if broken:
        lines.append("`import oodprompt.plugin` at the top of train.py mends these at run time")
    return lines, []


# --- the machine -----------------------------------------------------------------------------------------------


def versions() -> Section:
    """Versions of Python, of us, and of the packages that matter."""
    lines, problems = [f"python {platform.python_version()}", f"oodprompt {oodprompt.__version__}"], []
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{package}: not installed")
            problems.append(f"{package} is not installed: pip install -e . in the checkout of OODPrompt")
    return lines, problems


def devices() -> Section:
    """GPUs with their memory, cores and memory of the machine."""
    import torch

    gib, lines = 2**30, []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        lines.append(
            f"GPU {i}: {torch.cuda.get_device_name(i)}, {free / gib:.1f} of {total / gib:.1f} GiB of memory free"
        )
    lines = lines or ["no CUDA GPU: runs use the CPU"]
    memory = ""
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not on every system
        memory = f", {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / gib:.1f} GiB of memory"
    return [*lines, f"CPU: {os.cpu_count()} cores{memory}"], []


def storage() -> Section:
    """Whether caches and the working folder can be written, and how much space is left."""
    lines, problems = [], []
    places = {
        "weights": "~/.cache/clip",
        "features": os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/oodprompt",
        "working folder": ".",
    }
    for what, place in places.items():
        path = Path(place).expanduser().absolute()
        there = next(p for p in (path, *path.parents) if p.exists())  # the nearest that is there
        free = shutil.disk_usage(there).free / 2**30
        writable = os.access(there, os.W_OK)
        lines.append(f"{what}: {path}, {'' if writable else 'not '}writable, {free:.1f} GiB free")
        if not writable:
            problems.append(f"{path} cannot be written: give yourself the right to, or run from another account")
        elif free < _LOW_GIB:
            problems.append(f"{path} has {free:.1f} GiB left: free some space before you download or train")
    return lines, problems


# --- weights and data ------------------------------------------------------------------------------------------


class _TimeUp(Exception):
    """A section has used its seconds."""


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """``_TimeUp`` after so many seconds, where the system has such an alarm (in the main thread of a Unix process)."""
    if seconds <= 0:
        raise _TimeUp
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def up(*args: object) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def weights(folder: Path | None = None, seconds: float = _SECONDS) -> Section:
    """OpenAI's files in ``folder`` (default ``~/.cache/clip``), checked by SHA256; nothing is downloaded."""
    from oodprompt.backbones.weights import EMBEDDED, OPENAI_WEIGHTS, _fetch

    folder, end = folder or Path("~/.cache/clip").expanduser(), time.monotonic() + seconds
    lines, problems = [f"{', '.join(EMBEDDED)}: come with the package"], []
    for name, (_, file) in OPENAI_WEIGHTS.items():
        if not (folder / file).is_file():
            continue
        try:
            with _at_most(end - time.monotonic()):
                lines.append(f"{name}: {_fetch(name, folder)}, SHA256 right")
        except _TimeUp:
            lines.append(f"{name}: {folder / file}, not checked for lack of time (a run checks it)")
        except UserError as error:
            lines.append(f"{name}: {folder / file}, damaged")
            problems.append(str(error))
        except OSError as error:
            lines.append(f"{name}: {folder / file}, cannot be read")
            problems.append(f"{folder / file} cannot be read: {error.strerror}; give yourself the right to")
    absent = [name for name, (_, file) in OPENAI_WEIGHTS.items() if not (folder / file).is_file()]
    if absent:
        lines.append(f"not in {folder}, downloaded at first use: {', '.join(absent)}")
    return lines, problems


def data_sets(root: str, seconds: float = _SECONDS) -> Section:
    """Which data sets would load from ``root``, by their own checks; large ones are not read to the end.

    Of those that load, as many images are looked at as the time allows.
    """
    from oodprompt.config.keys import get_cfg_default
    from oodprompt.config.registry import DATASET_REGISTRY
    from oodprompt.datasets.file_lists import FilesDataset

    lines, problems = ["ShapesOnScenes: renders itself", "PhotosOnPlaces: is built from TinyImageNet"], list[str]()
    if not root:
        return [*lines, "others: give --root DIR, the folder that holds them"], problems
    if not Path(root).expanduser().is_dir():
        return lines, [f"--root: there is no folder {Path(root).absolute()}; give the one that holds the data sets"]
    absent, end = [], time.monotonic() + seconds
    loaded: list[tuple[CfgNode, DatasetBase]] = []
    for name, cls in DATASET_REGISTRY.items():
        if not issubclass(cls, FilesDataset):
            continue
        cfg = get_cfg_default()
        cfg.DATASET.ROOT, cfg.DATASET.NAME = root, name
        if cls.domains:
            cfg.DATASET.SOURCE_DOMAINS, cfg.DATASET.TARGET_DOMAINS = tuple(cls.domains[:-1]), (cls.domains[-1],)
        own = cls.places if cls.places else (cfg.DATASET.CSV.FILE,) if name == "CSV" else ()
        found = [place for place in own if place != "." and (Path(root).expanduser() / place).exists()]
        if not found:
            absent.append(name)
            continue
        try:
            with _at_most(end - time.monotonic()):
                data = cls(cfg)
            counts = " / ".join(f"{len(split):,}" for split in (data.train_x, data.val, data.test))
            lines.append(f"{name}: {counts} images to train, validate, test; {data.num_classes} classes")
            loaded.append((cfg, data))
        except _TimeUp:
            lines.append(f"{name}: {found[0]} is there; not read to the end for lack of time")
        except (UserError, OSError) as error:
            lines.append(f"{name}: {found[0]} is there, but would not load")
            problems.append(str(error))
    end = time.monotonic() + seconds
    for number, (cfg, data) in enumerate(loaded):
        said, wrong = _images(cfg, data, (end - time.monotonic()) / (len(loaded) - number))
        lines, problems = lines + said, problems + wrong
    if absent:
        lines.append(f"not in {root}: {', '.join(absent)} (datasets/README.md says where to get them)")
    return lines, problems


def _images(cfg: CfgNode, data: DatasetBase, seconds: float) -> Section:
    """What the images of a data set have to say, of as many as can be looked at in so many seconds."""
    from oodprompt.engine.check import check_images

    name = cfg.DATASET.NAME
    try:
        with _at_most(seconds):
            found = check_images(cfg, data, until=time.monotonic() + 0.8 * seconds, show=False)
    except _TimeUp:
        return [f"{name}: its images are not looked at for lack of time (train.py --no-train does)"], []
    part = "all" if found.looked == found.images else f"{found.looked:,} of"
    lines = [f"{name}: {part} {found.images:,} images looked at", *(f"{name}: {finding}" for finding in found.findings)]
    error = found.error()
    return lines, str(error).splitlines() if error is not None else []


# --- a trial run -----------------------------------------------------------------------------------------------


def trial() -> Section:
    """One image and one text through the embedded CLIP; what stops this stops every run."""
    try:
        import torch

        from oodprompt.backbones import load_backbone

        clip = load_backbone("tiny")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        clip, size = clip.to(device), clip.visual.input_resolution
        with torch.no_grad():
            image = clip.encode_image(torch.linspace(-1, 1, 3 * size * size, device=device).view(1, 3, size, size))
            text = clip.encode_text(clip.tokenizer(["a photo of a circle"]).to(device))
        if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
            return ["features are not finite"], [f"PyTorch computes wrongly on {device}: install it anew"]
    except Exception as error:  # whatever an installation gone wrong raises
        reason = (str(error).splitlines() or [""])[0]
        return [f"failed: {type(error).__name__}: {reason}"], [
            f"the embedded CLIP does not run ({type(error).__name__}: {reason}); install again with pip install -e ."
        ]
    return [f"the embedded CLIP runs on {device}"], []


def report(root: str = "") -> tuple[str, bool]:
    """The whole report and whether a run is possible."""
    ran = trial()
    sections: dict[str, Section] = {"Versions": versions()}
    if not ran[1]:
        sections |= {"Devices": devices(), "Dassl": dassl(), "Weights": weights(), "Data sets": data_sets(root)}
    sections |= {"Storage": storage(), "Trial": ran}
    parts = [f"{title}\n" + "".join(f"  {line}\n" for line in lines) for title, (lines, _) in sections.items()]
    problems = [problem for _, problems in sections.values() for problem in problems]
    verdict = "A run is possible." if not ran[1] else "No run is possible."
    wrong = "".join(f"  - {problem}\n" for problem in problems)
    parts.append(f"{verdict} " + (f"What is wrong:\n{wrong}" if problems else "Nothing is wrong.\n"))
    return "\n".join(parts), not ran[1]


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt doctor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", default="", metavar="DIR", help="folder that holds the data sets")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in oodprompt.cli.main
    possible = False

    def work() -> None:
        nonlocal possible
        text, possible = report(build_parser().parse_args(argv).root)
        print(text, end="")

    return exit_status(work) or (0 if possible else 1)


if __name__ == "__main__":
    sys.exit(main())
