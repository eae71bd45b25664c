"""One case of ``step_time.py``: builds the trainer, does steps of training, and measures them.

Weights, kept features and what discovery would find are random, so that nothing is downloaded, encoded or trained ahead
of the first step. Whole steps are timed in a pass of their own; what their parts take, in a second one.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import oodprompt.trainers  # noqa: F401 (registers them)
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.backbones.weights import SHAPES
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum
from oodprompt.data.loading import Batch, Loader
from oodprompt.engine import assembly
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from oodprompt.features import views
from oodprompt.methods.attributes import DiscoveredAttributes, DiscoveredClusters

WARM_UP = {"cpu": 2, "cuda": 10}  # steps ahead of the timed ones, by kind of device
MEASURES = ("step_s", "mean_s", "host_s", "image_fwd_s", "text_fwd_s", "backward_s", "setup_s", "peak_mib")
COUNTS = ("launches", "waits")  # of a step, as the profiler of a GPU sees them
_KEPT_BATCHES = 4  # of images, which stay in memory and are taken in turns

_WORDS = """
    red golden northern spotted giant common grey mountain african marbled wild striped hooded desert siberian
    crested dwarf velvet coastal painted river arctic bearded emerald tufted
"""
_NOUNS = """
    water bird, woodpecker, shepherd dog, fire truck, butterfly, utility vehicle, sailing boat, pepper, owl,
    coffee maker, tree frog, salamander, fox, acoustic guitar, mushroom, bicycle, hermit crab, terrier, bridge,
    steam locomotive, orchid, pickup truck, lizard, mailbox, hunting dog, cathedral, beetle, jigsaw puzzle, hawk,
    tennis racket, squirrel, cheeseburger, wolf spider, lighthouse, rabbit, leather sofa, dragonfly,
    suspension bridge, sparrow, wheelbarrow
"""


def class_names(n: int) -> list[str]:
    """The first ``n`` of 1000 distinct names of two or three English words."""
    words, nouns = _WORDS.split(), [" ".join(noun.split()) for noun in _NOUNS.split(",")]
    # Each round through the 40 nouns gives every noun the next of the 25 words; 7 keeps neighbours' words apart.
    return [f"{words[(i // 40 + 7 * (i % 40)) % 25]} {nouns[i % 40]}" for i in range(n)]


# --- moments and memory ------------------------------------------------------------------------------------------


class Moments:
    """Moments on a device and the seconds between them. On a GPU they are events, for which the host does not wait."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until all work that was queued is done; ``between`` needs that."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self.on_gpu else last - first


class Peak:
    """The most memory held since ``restart``, in MiB: allocated tensors on a GPU, else the process's resident memory."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def restart(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            return
        # Linux forgets the peak when 5 is written here; elsewhere building the trainer and the warm-up count too.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        if self.on_gpu:
            return torch.cuda.max_memory_allocated() / 2**20
        # Not ru_maxrss where there is this: a new process inherits that of the one which started it.
        with contextlib.suppress(OSError):
            if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
                return int(match[1]) / 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


# --- a trainer and its batches -----------------------------------------------------------------------------------


def random_backbone(
    name: str, path: str = "", cache_dir: str = "", activation: str = "auto", layers: int | None = None
) -> CLIP:
    """A CLIP of the named architecture, in the place of ``load_backbone``; drawn on the GPU where there is one.

    ``layers``: blocks of each tower in place of the architecture's; a ViT's alone.
    """
    shape = SHAPES[name]
    if layers is not None:
        shape = replace(shape, text_layers=layers, vision_layers=layers if shape.vision_patch else shape.vision_layers)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return CLIP(shape).eval().requires_grad_(False)


def build(case: dict[str, Any], folder: Path) -> PromptTrainer:
    """The trainer of a case, over a data set of which only classes and attributes matter.

    Its images are the files ``case["images"]`` in turns, ``case["epoch"]`` in all; where it names none, one of noise.
    """
    arguments = [*case["arguments"], "--output-dir", str(folder)]
    cfg = setup_cfg(build_parser().parse_intermixed_args(arguments))
    pixels = np.random.default_rng(0).integers(0, 256, (*cfg.INPUT.SIZE, 3), dtype=np.uint8)
    image, test_image = folder / "image.png", folder / "test_image.png"
    for file, size in ((image, cfg.INPUT.SIZE[0]), (test_image, 1)):
        Image.fromarray(pixels[:size, :size]).save(file)
    names, images = class_names(case["classes"]), case.get("images", [str(image)])
    length = case.get("epoch") or max(len(names), _KEPT_BATCHES * case["batch"])

    @DATASET_REGISTRY.register()
    class StepTime(DatasetBase):
        attribute_names = ("land", "water")
        attribute_prompts = (("a photo of land.",), ("a photo of water.",))

        def __init__(self, cfg: Any) -> None:
            data = [
                Datum(images[i % len(images)], i % len(names), classname=names[i % len(names)], attribute=i % 2)
                for i in range(length)
            ]
            super().__init__(cfg, data, test=[Datum(str(test_image), 0, classname=names[0])])

    named = cfg.MODEL.BACKBONE.NAME in SHAPES and not cfg.MODEL.BACKBONE.PATH
    drawn = mock.patch.object(assembly, "load_backbone", partial(random_backbone, layers=case.get("layers")))
    try:
        with drawn if named else contextlib.nullcontext():
            return build_trainer(cfg)
    finally:
        DATASET_REGISTRY._objects.pop("StepTime")  # the next case of this process has one of its own


@contextlib.contextmanager
def made_up(trainer: PromptTrainer) -> Iterator[None]:
    """Kept image features, features of regions and the discovered cluster are random while this lasts."""
    width = trainer.clip.shape.embed_dim
    random = torch.Generator().manual_seed(1)

    def features(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, width, generator=random), dim=-1).to(trainer.device)

    def train_views(data: Any, encode: Any, number: int, *args: Any, **kwargs: Any) -> Tensor:
        return features(len(trainer.dataset.train_x)).expand(number, -1, -1).contiguous()

    with mock.patch.object(views, "train_views", train_views), contextlib.ExitStack() as regions:
        if trainer.objective.takes_regions:
            owner = trainer.region_features.regions("train").owner
            clusters = DiscoveredClusters((1,), {"train": torch.arange(len(owner)) % 3}, {"train": owner})
            patch = mock.patch.object(DiscoveredAttributes, "found", clusters)
            regions.enter_context(patch)
            if trainer.region_features.keeps(trainer.learner):
                kept = features(len(owner))
                regions.enter_context(mock.patch.object(trainer.region_features, "of", lambda split, learner: kept))
        yield


def endless_batches(trainer: PromptTrainer) -> Iterator[Batch]:
    """Batches as the engine's epochs give them: of kept features by its loader, or of images ``from_memory``."""
    feed = trainer.encoder.batches("train")
    if not trainer.encoder.views:
        yield from from_memory(feed)
    for epoch in itertools.count():
        feed.set_epoch(epoch)
        yield from feed


def from_memory(loader: Loader) -> Iterator[Batch]:
    """The first few batches of ``loader`` in turns, without end.

    Their images are read once and stay in memory as the loader's own workers leave them, page-locked for a GPU. What the
    loader does with them then, as copying them to the GPU, it does each time.
    """
    loader.set_epoch(0)
    kept = list(itertools.islice(loader._source(), _KEPT_BATCHES))
    with mock.patch.object(loader, "_source", lambda: _Endless(kept)):
        yield from loader


class _Endless:
    """Batches in turns, in the place of a ``DataLoader`` without workers."""

    num_workers = 0

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return (dict(batch) for batch in itertools.cycle(self.batches))


def make_batch(trainer: PromptTrainer, size: int) -> Batch:
    """The first batch; ``size`` is that of the trainer's loader."""
    return next(endless_batches(trainer))


# --- measurements ------------------------------------------------------------------------------------------------


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Build the trainer, do the steps, and return their times, the peak, counts, and where and how they ran."""
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trainer = build(case, Path(folder))
        if not any(p.requires_grad for p in nn.ModuleList([trainer.learner, *trainer.debiasers]).parameters()):
            raise UserError(f"{trainer.cfg.TRAINER.NAME} trains nothing, so there is no step to time")
        stack.enter_context(made_up(trainer))
        go = steps_of(trainer)
        found = whole_steps(go, trainer.device, case["steps"], case.get("seconds"), case.get("warm_up"))
        found |= part_times(trainer, go, max(3, min(found["steps"], 10)))
        found |= counts(go, trainer.device) if case.get("count") else dict.fromkeys(COUNTS)
    return {**where(trainer.device), "precision": trainer.precision, **found}


def where(device: torch.device) -> dict[str, Any]:
    """The columns that say where a case ran."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def steps_of(trainer: PromptTrainer) -> Callable[[], None]:
    """What the engine does ahead of the first step; returns what takes the next batch and does a step. No epoch ends."""
    trainer.encoder.batches("train")
    if trainer.learner.needs_frozen_features and trainer.encoder.keeps_frozen_features:
        trainer.encoder.frozen_features_of("train")
    for debiaser in trainer.debiasers:
        debiaser.before_train()
    trainer.num_batches, trainer.batch_idx = sys.maxsize, -1
    trainer.before_epoch()
    batches = endless_batches(trainer)

    def go() -> None:
        trainer.batch_idx += 1
        trainer.forward_backward(next(batches))

    return go


def whole_steps(
    go: Callable[[], None], device: torch.device, steps: int, seconds: float | None = None, warm_up: int | None = None
) -> dict[str, Any]:
    """Times of whole steps, the peak, and how many steps were timed; ``go`` does one step.

    At most ``steps``; where there are ``seconds``, as many as fit, and at least 3. A step's time on a GPU is from its end
    to the end of the next one; ``host_s`` is the time until its work was queued. ``setup_s`` is what the steps ahead of
    the timed ones took longer than the last of them.
    """
    moments, peak = Moments(device), Peak(device)
    end = None if seconds is None else time.perf_counter() + seconds
    took: list[float] = []
    for _ in range(warm_up or WARM_UP[device.type]):
        began = time.perf_counter()
        go()
        moments.wait()
        took.append(time.perf_counter() - began)
        if len(took) > 1 and end is not None and time.perf_counter() > end:
            break
    if seconds is not None:
        steps = min(steps, max(3, int(seconds / took[-1])))
    peak.restart()
    ends, host = [moments.now()], []
    for _ in range(steps):
        began = time.perf_counter()
        go()
        host.append(time.perf_counter() - began)
        ends.append(moments.now())
    moments.wait()
    times = [moments.between(a, b) for a, b in itertools.pairwise(ends)]
    return {
        "step_s": round(median(times), 6),
        "mean_s": round(mean(times), 6),
        "host_s": round(median(host), 6) if moments.on_gpu else None,
        "setup_s": round(sum(took) - len(took) * took[-1], 3),
        "peak_mib": round(peak.mib(), 1),
        "steps": steps,
    }


def part_times(trainer: PromptTrainer, go: Callable[[], None], steps: int) -> dict[str, float]:
    """Seconds of a step in the image tower, in the learner's forward pass, and in backward pass and optimiser."""
    moments = Moments(trainer.device)
    marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = moments.now()
            result = function(*args, **kwargs)
            marks[part].append((began, moments.now()))
            return result

        return call

    encoder, objective = trainer.encoder, trainer.objective
    kind = type(objective)
    rows: dict[str, list[float]] = defaultdict(list)
    patch = mock.patch.object
    with (
        patch(encoder, "encode_image", timed("image", encoder.encode_image)),
        patch(encoder, "encode_frozen", timed("image", encoder.encode_frozen)),
        patch(trainer.learner, "forward", timed("text", trainer.learner.forward)),
        patch(kind, "__call__", timed_method(timed, "objective", kind.__call__)),
    ):
        for _ in range(steps):
            marks.clear()
            go()
            end = moments.now()
            moments.wait()
            rows["image_fwd_s"].append(sum(moments.between(*pair) for pair in marks["image"]))
            rows["text_fwd_s"].append(sum(moments.between(*pair) for pair in marks["text"]))
            rows["backward_s"].append(moments.between(marks["objective"][-1][1], end))
    return {part: round(median(values), 6) for part, values in rows.items()}


def timed_method(timed: Callable, part: str, method: Callable) -> Callable:
    """``timed`` for a method that is looked up in its class."""
    call = timed(part, method)
    return lambda self, *args, **kwargs: call(self, *args, **kwargs)


def counts(go: Callable[[], None], device: torch.device, steps: int = 2) -> dict[str, float | None]:
    """``COUNTS`` per step on a GPU, by torch's profiler; None where it cannot see the GPU's calls."""
    nothing: dict[str, float | None] = dict.fromkeys(COUNTS)
    if device.type != "cuda":
        return nothing
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function("one step"):
                go()
        torch.cuda.synchronize()
    on_host = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CPU]
    found = count_calls([(e.name, e.time_range.start, e.time_range.end) for e in on_host], "one step")
    return {key: value / steps for key, value in found.items()} if found["launches"] else nothing


def count_calls(events: Iterable[tuple[str, float, float]], inside: str) -> dict[str, int]:
    """Calls of the CUDA runtime that start work and that wait for it, among events (name, start, end) inside ``inside``."""
    events = list(events)
    spans = [(start, end) for name, start, end in events if name == inside]
    names = [name for name, start, _ in events if any(first <= start <= last for first, last in spans)]
    starts = re.compile(r"cu(da)?(LaunchKernel|GraphLaunch|Memcpy|Memset|LaunchCooperative)\w*")
    return {
        "launches": sum(bool(starts.match(name)) for name in names),
        "waits": sum(bool(re.match(r"cu(da)?\w*Synchronize", name)) for name in names),
    }


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """``measure``, or ``{"error": ...}`` for what a user can mend and for memory that was refused."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return measure(case)
    except UserError as error:
        return {"error": str(error)}
    except (MemoryError, torch.cuda.OutOfMemoryError):
        return {"error": "out of memory"}
    except RuntimeError as error:
        if "allocate memory" not in str(error):  # torch has no exception of its own for memory of the CPU
            raise
        return {"error": "out of memory"}


def answer_and_clear(case: dict[str, Any]) -> dict[str, Any]:
    """``answer`` for a process that goes on to another case: whatever goes wrong is an error, and memory is given back."""
    try:
        return answer(case)
    except Exception as error:  # the next case may do better
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
