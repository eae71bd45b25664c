"""Cached image features stand for the images: same order, same labels, same values."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from oodprompt import cli
from oodprompt.backbones import CLIP, load_backbone
from oodprompt.backbones.weights import digest
from oodprompt.config.keys import leaves
from oodprompt.data.columns import Images
from oodprompt.data.dataset import Datum
from oodprompt.engine import checkpoint
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features import cache
from oodprompt.features.cache import FeatureCache
from oodprompt.features.store import PartialFile
from oodprompt.features.views import extract, rows_of, whole
from tests.helpers.forks import Forks
from tests.helpers.small_data import RANDOM, MakeCfg, MakeData

WIDTH = 128  # of tiny's features


class Disk:
    """A ``FeatureCache`` on disk over made-up features that counts how often they are computed."""

    def __init__(self, folder: Path, make_cfg: MakeCfg, images: list[Datum]) -> None:
        self.folder, self.make_cfg, self.images = folder, make_cfg, images
        self.clip, self.precision, self.device = load_backbone("tiny"), "fp32", torch.device("cpu")
        self.is_train, self.keys, self.computed, self.said = False, {}, [], []

    def compute(self, view: int) -> Tensor:
        self.computed.append(view)
        return torch.arange(len(self.images) * WIDTH).reshape(-1, WIDTH) + 0.1 * view + len(self.computed)

    def views(self, number: int = 1) -> list[np.ndarray]:
        """As a new run would get them."""
        keys = {"DATALOADER__FEATURE_CACHE": "disk", "DATALOADER__CACHE_DIR": str(self.folder)} | self.keys
        cache = FeatureCache(self.make_cfg(**keys), self.clip, self.precision, self.device, self.said.append)
        return cache.views(
            "train", self.images, number, self.is_train, lambda v, start: iter([self.compute(v)[start:]])
        )

    def files(self) -> set[str]:
        return {path.name for path in self.folder.glob("*") if path.suffix not in (".lock", ".json")}


@pytest.fixture
def disk(tmp_path: Path, make_cfg: MakeCfg, make_data: MakeData) -> Disk:
    return Disk(tmp_path / "cache", make_cfg, make_data([0, 1, 0, 1, 2]))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of images of each batch that CLIP's image tower sees."""
    sizes: list[int] = []
    encode = CLIP.encode_image

    def counting(self: CLIP, images: Tensor, *more: Any) -> Tensor:
        sizes.append(len(images))
        return encode(self, images, *more)

    monkeypatch.setattr(CLIP, "encode_image", counting)
    return sizes


ANCHORED = ("TRAINER.COOPOOD.ANCHOR", "attributes", "INPUT.TRANSFORMS", "('random_flip','normalize')", "INPUT.VIEWS", 2)


@pytest.mark.parametrize(
    ("trainer", "keys", "views"), [("CoOp", (), [80]), ("CoOpOOD", ANCHORED, [80, 80, 80])], ids=["CoOp", "2 views"]
)
def test_runs_from_memory_from_new_and_from_old_files_are_the_same(
    trainer: str,
    keys: tuple[Any, ...],
    views: list[int],
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    encoded: list[int],
) -> None:
    results, states, counts = [], [], []
    for name, choice in (("memory", "memory"), ("new", "disk"), ("old", "disk")):
        encoded.clear()
        where = ("DATALOADER.FEATURE_CACHE", choice, "DATALOADER.CACHE_DIR", tmp_path / "cache")
        results.append(run(trainer, name, "TEST.FINAL_MODEL", "best_val", *where, *keys))
        states.append(checkpoint.load(checkpoint.file_of(tmp_path / name, "prompt_learner", 3))["state_dict"]["ctx"])
        counts.append(sum(encoded))
        assert len(list((tmp_path / "cache").glob("*.npy"))) == (0 if name == "memory" else len(views) + 2)
    everything = sum(views) + 16 + 24  # validation and test
    assert counts == [everything, everything, 0]
    for name, verb in (("new", "written to"), ("old", "read from")):
        log = (tmp_path / name / "log.txt").read_text()
        assert all(f"Image features: {split} {verb} {tmp_path}" in log for split in ("val", "test"))
        assert f"Image features: train {verb} " in log
    for result, state in zip(results[1:], states[1:], strict=True):
        assert torch.equal(state, states[0])
        for key in ("accuracy", "macro_f1", "groups", "classes", "best_epoch", "other_predictions"):
            assert result[key] == results[0][key]


def test_evaluation_alone_reads_what_training_wrote(
    arguments: Callable[..., list[str]], tmp_path: Path, encoded: list[int]
) -> None:
    flags = arguments("CoOp", "run", "DATALOADER.FEATURE_CACHE", "disk", "DATALOADER.CACHE_DIR", tmp_path / "cache")
    cli.run(flags)
    assert encoded
    encoded.clear()
    cli.run([*flags, "--eval-only", "--model-dir", str(tmp_path / "run"), "--output-dir", str(tmp_path / "eval")])
    assert not encoded and (tmp_path / "eval" / "results.json").is_file()


def test_two_processes_write_what_one_reads(
    arguments: Callable[..., list[str]],
    run: Callable[..., dict[str, Any]],
    tmp_path: Path,
    encoded: list[int],
    forks: Forks,
) -> None:
    where = ("DATALOADER.FEATURE_CACHE", "disk", "DATALOADER.CACHE_DIR", tmp_path / "cache", "OPTIM.MAX_EPOCH", 1)
    forks.together(2, ["train.py", *arguments("CoOp", "two", *where, "DATALOADER.TRAIN_X.BATCH_SIZE", 8)])
    written = (tmp_path / "two" / "log.txt").read_text()
    forks.together(2, ["train.py", *arguments("CoOp", "again", *where, "DATALOADER.TRAIN_X.BATCH_SIZE", 8)])
    read = (tmp_path / "again" / "log.txt").read_text()
    for split in ("train", "test"):
        assert f"{split} written to" in written and f"{split} read from" in read
    run("CoOp", "one", *where)
    assert not encoded
    one, two = (
        checkpoint.load(checkpoint.file_of(tmp_path / d, "prompt_learner", 1))["state_dict"]["ctx"]
        for d in ("one", "two")
    )
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def _rewrite(disk: Disk) -> None:
    path = Path(disk.images[2].impath)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def _touch(disk: Disk) -> None:
    status = os.stat(disk.images[2].impath)
    os.utime(disk.images[2].impath, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _grow(disk: Disk) -> None:
    status = os.stat(disk.images[2].impath)
    with open(disk.images[2].impath, "ab") as file:
        file.write(b"0")
    os.utime(disk.images[2].impath, ns=(status.st_atime_ns, status.st_mtime_ns))


def _train_weights(disk: Disk) -> None:
    disk.clip.visual.ln_post.bias[3] += 1e-6


CHANGES: dict[str, Callable[[Disk], Any]] = {
    "image rewritten": _rewrite,
    "image of another time": _touch,
    "image of another size": _grow,
    "images in another order": lambda d: d.images.reverse(),
    "one image less": lambda d: d.images.pop(),
    "range of grey values": lambda d: d.keys.update(INPUT__IMAGE_RANGE=(0, 4095)),
    "key of the transform": lambda d: d.keys.update(INPUT__INTERPOLATION="bicubic"),
    "how images get their size": lambda d: d.keys.update(INPUT__RESIZE="squash"),
    "list among the keys": lambda d: d.keys.update(INPUT__PIXEL_STD=[0.2, 0.2, 0.3]),
    "train transform": lambda d: setattr(d, "is_train", True),
    "backbone": _train_weights,
    "precision": lambda d: setattr(d, "precision", "bf16"),
    "device": lambda d: setattr(d, "device", torch.device("cuda")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_features_are_computed_anew_after_a_change_of(change: str, disk: Disk) -> None:
    first, files = np.array(disk.views()[0]), disk.files()
    np.testing.assert_array_equal(disk.views()[0], first)
    assert disk.computed == [0] and disk.files() == files
    CHANGES[change](disk)
    second = disk.views()[0]
    assert disk.computed == [0, 0] and disk.files() > files
    assert not np.array_equal(second[:4], first[:4])
    assert [line.split(" /")[0] for line in disk.said] == [
        f"Image features: train {x}" for x in ("written to", "read from", "written to")
    ]


def test_features_of_a_gpu_are_named_by_tf32_where_it_is_not_torchs_default(disk: Disk) -> None:
    disk.device = torch.device("cuda")
    found = []
    for choice in ("convolutions", "all", "none", "all"):
        disk.keys.update(TRAIN__TF32=choice)
        disk.views()
        found.append(disk.files())
    assert len(found[0]) < len(found[1]) < len(found[2]) == len(found[3])


def test_files_from_before_there_was_a_choice_of_resizing_are_read(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    disk.views()
    without = {key: value for key, value in leaves(disk.make_cfg().INPUT).items() if key != "RESIZE"}
    monkeypatch.setattr(cache, "leaves", lambda keys: {**without, "RESIZE": "whatever it is by default"})
    disk.views()
    assert disk.computed == [0]


SAME: dict[str, Callable[[Disk], Any]] = {
    "TF32 on the CPU": lambda d: d.keys.update(TRAIN__TF32="all"),
    "labels": lambda d: setattr(d, "images", [image.relabelled(7) for image in d.images]),
    "the seed where nothing is random": lambda d: d.keys.update(SEED=5),
    "the number of views": lambda d: d.keys.update(INPUT__VIEWS=1),
    "the limit on pixels": lambda d: d.keys.update(INPUT__MAX_PIXELS=10**9),
    "the form of a path": lambda d: setattr(d, "images", [Datum(os.path.relpath(i.impath), i.label) for i in d.images]),
}


@pytest.mark.parametrize("change", SAME)
def test_features_are_read_whatever(change: str, disk: Disk) -> None:
    disk.is_train = True
    disk.views()
    SAME[change](disk)
    disk.views()
    assert disk.computed == [0]


def test_random_views_follow_seed_and_number_and_are_shared_one_by_one(disk: Disk) -> None:
    disk.is_train, disk.keys = True, {"INPUT__TRANSFORMS": RANDOM}
    two = disk.views(2)
    assert not np.array_equal(two[0], two[1])
    three = disk.views(3)
    assert disk.computed == [0, 1, 2]
    assert all(np.array_equal(a, b) for a, b in zip(two, three[:2], strict=True))
    disk.keys["SEED"] = 2
    disk.views(2)
    assert disk.computed == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: content + b"0",
        lambda content: b"",
        lambda content: content.replace(b"<f4", b"<i4"),
        lambda content: content.replace(b"(5, 128)", b"(128, 5)"),
        lambda content: b"\0" * len(content),
    ],
    ids=["truncated", "longer", "empty", "other numbers", "other shape", "zeros"],
)
def test_a_damaged_file_is_noticed_and_computed_anew(damage: Callable[[bytes], bytes], disk: Disk) -> None:
    disk.views()
    (name,) = disk.files()
    file = disk.folder / name
    file.write_bytes(damage(file.read_bytes()))
    values = disk.views()[0]
    np.testing.assert_array_equal(values, disk.compute(0) - 1)
    assert disk.said[1].startswith(f"Note: {file} is damaged (") and disk.said[1].endswith("computed anew")
    assert len(disk.said) == 3 and disk.files() == {name}


@pytest.mark.parametrize("error", [OSError, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_nothing_is_left_of_a_write_that_fails(
    error: type[BaseException],
    place: str,
    disk: Disk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        assert disk.files()  # the unfinished file
        raise error(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, place, fail)
        with pytest.raises(error):
            disk.views()
        if error is OSError:
            assert cli.exit_status(disk.views) == 2
            assert f"the disk is full for {disk.folder}" in capsys.readouterr().err
    assert disk.files() == set()
    disk.computed.clear()
    disk.views()  # the lock was given back
    assert disk.computed == [0] and len(disk.files()) == 1


def test_features_that_took_long_outlive_the_run_by_themselves(disk: Disk) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": "auto", "DATALOADER__CACHE_SECONDS": 0.0}
    first = disk.views()
    assert isinstance(first, Tensor) and len(disk.files()) == 1 and "written to" in disk.said[-1]
    second = disk.views()
    assert torch.equal(first, second) and disk.computed == [0] and "read from" in disk.said[-1]
    disk.keys["DATALOADER__CACHE_SECONDS"] = 1000.0
    disk.images.pop()
    assert isinstance(disk.views(), Tensor) and len(disk.files()) == 1 and len(disk.said) == 2


class Killed(Exception):
    """Ends a computation as a signal would."""


def parts_of(disk: Disk, asked: list[int], stop: int | None = None) -> Any:
    """Features in parts of 2 rows; ``stop``: what comes at that row. ``asked`` grows by the first row of each call."""

    def compute(view: int, start: int) -> Any:
        asked.append(start)
        rows = torch.arange(5.0 * WIDTH).view(5, WIDTH)
        for i in range(start, 5, 2):
            if i == stop:
                raise Killed
            yield rows[i : i + 2]

    keys = {"DATALOADER__CACHE_DIR": str(disk.folder), "DATALOADER__TEST__BATCH_SIZE": 2} | disk.keys
    cache = FeatureCache(disk.make_cfg(**keys), disk.clip, disk.precision, disk.device, disk.said.append)
    return cache.views("train", disk.images, 1, False, compute)


@pytest.mark.parametrize("choice", ["disk", "auto"])
def test_work_that_is_broken_off_goes_on_where_it_was(choice: str, disk: Disk) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": choice, "DATALOADER__CACHE_SECONDS": 0.0}
    asked: list[int] = []
    with pytest.raises(Killed):
        parts_of(disk, asked, stop=4)
    values = parts_of(disk, asked)
    assert asked == [0, 4]
    np.testing.assert_array_equal(np.array(values[0]).reshape(-1), np.arange(5.0 * WIDTH))
    assert "go on behind the 4 of 5" in disk.said[0] and len(disk.files()) == 1


@pytest.mark.parametrize("memory", [64.0, 0.0])
def test_a_disk_that_gets_full_costs_the_file_and_not_the_run(
    memory: float, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": "auto", "DATALOADER__CACHE_SECONDS": 0.0}
    disk.keys["DATALOADER__CACHE_MEMORY_MIB"] = memory
    append, calls = PartialFile.append, []

    def full(self: PartialFile, rows: np.ndarray) -> None:
        calls.append(len(rows))
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", "features")
        append(self, rows)

    monkeypatch.setattr(PartialFile, "append", full)
    values = parts_of(disk, [])
    assert torch.equal(values[0].reshape(-1), torch.arange(5.0 * WIDTH)) and disk.files() == set()
    assert disk.said == ["Note: image features stay in memory and end with this run: the disk is full for features"]


def test_a_folder_that_cannot_be_used_costs_the_file_and_not_the_run(disk: Disk, tmp_path: Path) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": "auto", "DATALOADER__CACHE_SECONDS": 0.0}
    disk.folder = tmp_path / "file" / "folder"
    disk.folder.parent.write_text("in the way")
    assert disk.views().shape == (1, 5, WIDTH)
    assert len(disk.said) == 1 and "stay in memory" in disk.said[0] and "Not a directory" in disk.said[0]


@pytest.mark.parametrize("memory", [64.0, 0.0])
def test_features_of_images_that_change_meanwhile_are_not_kept(memory: float, disk: Disk) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": "auto", "DATALOADER__CACHE_SECONDS": 0.0}
    disk.keys["DATALOADER__CACHE_MEMORY_MIB"] = memory
    disk.images = Images.of(disk.images)
    compute = disk.compute

    def changing(view: int) -> Tensor:
        Path(disk.images[3].impath).write_bytes(b"another")
        return compute(view)

    disk.compute = changing
    values = disk.views()
    assert np.array_equal(np.array(values[0]), np.array(compute(0)) - 1)
    assert disk.files() == set() and "1 images of train were changed" in disk.said[0]
    assert disk.images[3].impath in disk.said[0]


def test_the_features_used_longest_ago_make_room(disk: Disk) -> None:
    size = 128 + 5 * WIDTH * 4
    disk.keys = {"DATALOADER__CACHE_LIMIT_GIB": 2.5 * size / 2**30}
    names = []
    for precision in ("fp32", "bf16"):
        disk.precision = precision
        disk.views()
        (name,) = disk.files() - set(names)
        names.append(name)
    for age, name in enumerate(names):
        os.utime(disk.folder / name, (1000 - age, 1000 - age))
    kept = disk.views()[0]  # bf16: older, but used now
    disk.precision = "fp16"
    disk.views()
    assert names[0] not in disk.files() and names[1] in disk.files() and len(disk.files()) == 2
    assert any("1 files of image features" in line for line in disk.said)
    disk.keys["DATALOADER__CACHE_LIMIT_GIB"] = size / 2**30
    disk.precision = "amp"
    disk.views()
    assert names[1] not in disk.files() and kept.sum() > 0  # still readable for who has it open


def _run(disk: Disk, barrier: Any, queue: Any, seconds: float) -> None:
    def slow(view: int) -> Tensor:
        queue.put("computes")
        time.sleep(seconds)
        return torch.full((5, WIDTH), float(os.getpid()))

    disk.compute = slow
    barrier.wait()
    values = disk.views()[0]
    queue.put((float(values[0, 0]), disk.said))


def test_of_runs_that_start_together_one_computes_and_the_others_wait(disk: Disk) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(3), context.Queue()
    runs = [context.Process(target=_run, args=(disk, barrier, queue, 1.0)) for _ in range(3)]
    for process in runs:
        process.start()
    outcomes = [queue.get(timeout=60) for _ in range(4)]
    for process in runs:
        process.join()
    assert outcomes.count("computes") == 1
    values, said = zip(*[outcome for outcome in outcomes if outcome != "computes"], strict=True)
    assert len(set(values)) == 1 and values[0] in [process.pid for process in runs]
    waiting = "Image features: train are being computed by another run, for which this one waits"
    assert sorted(lines.count(waiting) for lines in said) == [0, 1, 1]


def test_a_run_that_is_killed_gives_its_work_to_the_one_that_waits(disk: Disk) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(1), context.Queue()
    first = context.Process(target=_run, args=(disk, barrier, queue, 600.0))
    first.start()
    assert queue.get(timeout=60) == "computes"
    second = context.Process(target=_run, args=(disk, barrier, queue, 0.0))
    second.start()
    time.sleep(0.5)
    assert queue.empty() and second.is_alive()
    first.kill()
    assert queue.get(timeout=60) == "computes"
    assert queue.get(timeout=60)[0] == second.pid
    for process in (first, second):
        process.join()


def test_waiting_goes_on_for_longer_than_one_round(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oodprompt.features.cache._PATIENCE", 0.05)
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(1), context.Queue()
    process = context.Process(target=_run, args=(disk, barrier, queue, 1.0))
    process.start()
    assert queue.get(timeout=60) == "computes"
    assert disk.views()[0][0, 0] == process.pid and not disk.computed
    assert len(disk.said) == 2  # that it waits, once, and that it reads
    process.join()


def test_a_folder_that_cannot_be_used_is_named(disk: Disk, tmp_path: Path) -> None:
    disk.folder = tmp_path / "file" / "folder"
    disk.folder.parent.write_text("in the way")
    with pytest.raises(UserError, match=f"CACHE_DIR: cannot use {disk.folder} .*Not a directory.*; give a folder"):
        disk.views()


@pytest.mark.parametrize(("mib", "expected"), [(5 * WIDTH * 4 / 2**20, False), (5 * WIDTH * 4 / 2**20 - 1e-6, True)])
def test_auto_goes_to_disk_above_its_limit(mib: float, expected: bool, disk: Disk) -> None:
    disk.keys = {"DATALOADER__FEATURE_CACHE": "auto", "DATALOADER__CACHE_MEMORY_MIB": mib}
    features = disk.views()
    assert isinstance(features, list) == expected and bool(disk.files()) == expected
    assert features[0].shape == (5, WIDTH) and bool(disk.said) == expected


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_auto_of_a_trainer(split: str, build: Callable[..., PromptTrainer], tmp_path: Path) -> None:
    memory = build("CoOp", "DATALOADER.CACHE_DIR", tmp_path / "cache")
    assert isinstance(memory.encoder.batches(split).features, Tensor) and not (tmp_path / "cache").exists()
    disk = build("CoOp", "DATALOADER.CACHE_DIR", tmp_path / "cache", "DATALOADER.CACHE_MEMORY_MIB", 0)
    assert len(list(disk.encoder.batches(split).features)) == 1 and len(list((tmp_path / "cache").glob("*.npy"))) == 1
    for a, b in zip(memory.encoder.batches(split), disk.encoder.batches(split), strict=True):
        assert torch.equal(a["image_features"], b["image_features"]) and a["impath"] == b["impath"]


@pytest.mark.parametrize("first", ["loader", "frozen"])
def test_frozen_train_features_from_files(first: str, build: Callable[..., PromptTrainer], tmp_path: Path) -> None:
    memory = build("CoOp").encoder.frozen_features_of("train")
    disk = build("CoOp", "DATALOADER.FEATURE_CACHE", "disk", "DATALOADER.CACHE_DIR", tmp_path / "cache")
    if first == "loader":
        disk.encoder.batches("train")
    frozen = disk.encoder.frozen_features_of("train")
    assert type(frozen) is Tensor and torch.equal(frozen, memory) and disk.encoder.frozen_features_of("train") is frozen
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_learner_that_encodes_in_its_own_way_is_kept_out_of_the_files(
    build: Callable[..., PromptTrainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ("DATALOADER.CACHE_DIR", tmp_path / "cache", "DATALOADER.CACHE_MEMORY_MIB", 0)
    usual = build("CoOp", *cache)
    usual.encoder.batches("test")

    class OwnEncoder(usual.learner_type):
        def encode_image(self, images: Tensor) -> Tensor:
            return -super().encode_image(images)

    monkeypatch.setattr(type(usual), "learner_class", OwnEncoder)
    trainer = build("CoOp", *cache)
    expected = extract(trainer.encoder.encode_image, trainer.test_loader, "", show=False)
    assert torch.equal(trainer.encoder.batches("test").features[0], expected)
    with pytest.raises(UserError, match="disk: this prompt learner encodes images in its own way"):
        build("CoOp", "DATALOADER.FEATURE_CACHE", "disk")


@pytest.mark.filterwarnings("error")
def test_rows_of_a_file(disk: Disk) -> None:
    view = disk.views()[0]
    assert isinstance(view, np.memmap) and not view.flags.writeable
    expected, index = torch.from_numpy(np.array(view)), torch.tensor([4, 0, 4])
    for rows, want in ((rows_of(view, index, "cpu"), expected[index]), (whole(view, torch.device("cpu")), expected)):
        assert torch.equal(rows, want) and rows.dtype == torch.float32
        rows += 1  # a copy: neither the file nor its read-only mapping is touched
    assert torch.equal(torch.from_numpy(np.array(disk.views()[0])), expected)
    assert rows_of(view, torch.tensor([], dtype=torch.long), "cpu").shape == (0, WIDTH)


def test_digest_sees_names_shapes_types_parameters_and_buffers() -> None:
    def module(name: str, parameter: list[float], buffer: Tensor) -> nn.Module:
        result = nn.Module()
        result.register_parameter(name, nn.Parameter(torch.tensor(parameter)))
        result.register_buffer("buffer", buffer)
        return result

    usual = ("weight", [1.0, 2.0], torch.zeros(()))
    different = [
        usual,
        ("scale", *usual[1:]),
        ("weight", [[1.0, 2.0]], usual[2]),
        ("weight", [1.0, 2.0 + 2**-22], usual[2]),
        (*usual[:2], torch.ones(())),
        (*usual[:2], torch.zeros((), dtype=torch.int32)),
    ]
    assert len({digest(module(*parts)) for parts in different}) == len(different)
    assert digest(module(*usual)) == digest(module(*usual))


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_frozen_features_are_of_the_view_that_training_sees(
    cache: str, build: Callable[..., PromptTrainer], tmp_path: Path
) -> None:
    """Wide images, which training squashes and testing crops."""
    trainer = build("CoOpOOD", "--root", tmp_path / "own", "DATALOADER.FEATURE_CACHE", cache)
    for datum in trainer.dataset.train_x:
        with Image.open(datum.impath) as image:
            image.resize((96, 48)).save(datum.impath)
    if cache == "auto":
        trainer.encoder.batches("train")
    batch = next(iter(trainer.train_loader_x))
    expected = trainer.encoder.encode_frozen(batch["img"])
    torch.testing.assert_close(
        trainer.encoder.frozen_features_of("train")[batch["index"]], expected, rtol=1e-4, atol=1e-5
    )


class OnGPU:
    """A part that says it is on a GPU; ``log`` gets what is done with it."""

    device = torch.device("cuda")

    def __init__(self, number: int, log: list[str]) -> None:
        self.number, self.log = number, log
        log.append(f"compute {number}")

    def numpy(self) -> np.ndarray:
        self.log.append(f"wait {self.number}")
        return np.array([self.number])

    def cpu(self) -> OnGPU:
        return self


@pytest.mark.parametrize("copied_ahead", [True, False])
def test_the_host_waits_for_a_part_when_the_gpu_has_the_next(
    copied_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    monkeypatch.setattr(cache, "_copied", lambda part: (log.append(f"copy {part.number}"), part.numpy)[1])
    parts = (OnGPU(i, log) for i in range(3))
    written = [on_host().item() for _, on_host in cache._one_behind(parts, lambda: copied_ahead)]
    assert written == [0, 1, 2]
    events = ["compute 0", "copy 0", "compute 1", "copy 1", "wait 0", "compute 2", "copy 2", "wait 1", "wait 2"]
    assert log == [event for event in events if copied_ahead or "copy" not in event]


def test_on_a_cpu_no_part_is_held_back() -> None:
    asked: list[int] = []
    parts = (torch.tensor([asked.append(i) or i]) for i in range(3))
    assert [(len(asked), on_host().item()) for _, on_host in cache._one_behind(parts, lambda: True)] == [
        (1, 0),
        (2, 1),
        (3, 2),
    ]
