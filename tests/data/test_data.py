"""From file lists to batches: splits, transforms, samplers, loaders, and what a user's files can get wrong."""

from __future__ import annotations

import io
import random
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from oodprompt.config.keys import get_cfg_default
from oodprompt.config.registry import DATASET_REGISTRY
from oodprompt.data.dataset import DatasetBase, Datum, few_shot, subsample_classes
from oodprompt.data.images import read_image
from oodprompt.data.loading import Batch, DataManager, Loader
from oodprompt.data.sampling import EpochBatches, epoch_order
from oodprompt.data.transforms import build_transform, is_random
from oodprompt.engine.trainer import build_trainer
from oodprompt.errors import UserError
from tests.helpers.small_data import MakeCfg, MakeData

RANDOM = ("random_resized_crop", "random_flip", "colorjitter", "cutout", "normalize", "gaussian_noise")


def batches_of(loader: Loader, epoch: int = 0) -> list[Batch]:
    loader.set_epoch(epoch)
    return list(loader)


def pixels_by_index(batches: list[Batch]) -> Tensor:
    index, images = (torch.cat([batch[key] for batch in batches]) for key in ("index", "img"))
    return images[index.argsort()]


# --- splits ----------------------------------------------------------------------------------------------------


def test_few_shot_depends_on_its_seed_alone(make_data: MakeData) -> None:
    data = make_data([0] * 8 + [1] * 8 + [2])
    drawn = few_shot(data, 3, seed=0)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    assert few_shot(data, 3, seed=0) == drawn
    assert Counter(d.label for d in drawn) == {0: 3, 1: 3, 2: 1}
    assert len(set(drawn)) == 7
    assert len({tuple(few_shot(data, 3, seed)) for seed in range(6)}) == 6
    assert few_shot(data, -1, seed=0) == data


def test_base_and_new_classes_are_renumbered_and_keep_the_rest(make_data: MakeData) -> None:
    train = make_data([4, 3, 2, 1, 0], domains=[5, 6, 7, 8, 9], attributes=[1, 0, -1, 1, 0])
    (base, test), (new, _) = subsample_classes("base", train, train[:3]), subsample_classes("new", train, [])

    def fields(data: list[Datum]) -> list[tuple[str, int, int, int]]:
        return [(d.classname, d.label, d.domain, d.attribute) for d in data]

    assert fields(base) == [("class 2", 2, 7, -1), ("class 1", 1, 8, 1), ("class 0", 0, 9, 0)]
    assert fields(new) == [("class 4", 1, 5, 1), ("class 3", 0, 6, 0)]
    assert fields(test) == fields(base)[:1]
    assert [d.impath for d in new] == [d.impath for d in train[:2]]
    assert subsample_classes("all", train) == [train]


class Toy(DatasetBase):
    """Splits given by the test."""

    splits: tuple[list[Datum], list[Datum], list[Datum]]

    def __init__(self, cfg: object) -> None:
        super().__init__(cfg, *self.splits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (([], [], []), "Toy: the test split is empty"),
        (([], [0], []), "Toy: the test split is empty"),
        (([], [3], [0, 1]), r"Toy: class 2 of 0\.\.3 has no image; every class needs one"),
        (([0, 1], [], []), "Toy: the test split is empty"),
        (([0, 2], [], [0]), r"Toy: class 1 of 0\.\.2 has no training image"),
        (([3], [], [0]), r"Toy: classes 0, 1, 2 of 0\.\.3 has no training image"),
        (([0, 1], [2], [0]), r"Toy: class 2 of 0\.\.2 has no training image"),
        (([0, 1], [], [3]), r"Toy: classes 2, 3 of 0\.\.3 has no training image"),
    ],
)
def test_empty_splits_and_classes(make_data: MakeData, labels: tuple[list[int], ...], message: str) -> None:
    data = make_data([*chain(*labels)])
    Toy.splits = tuple([data.pop(0) for _ in split] for split in labels)
    with pytest.raises(UserError, match=message):
        Toy(get_cfg_default())


@pytest.mark.parametrize(("which", "names"), [("all", [0, 1, 2]), ("base", [0, 1]), ("new", [2])])
def test_without_training_images_the_classes_are_those_of_the_others(
    make_data: MakeData, make_cfg: MakeCfg, which: str, names: list[int]
) -> None:
    data = make_data([2, 1, 0, 2])
    Toy.splits = ([], data[:1], data[1:])
    dataset = Toy(make_cfg(DATASET__SUBSAMPLE_CLASSES=which, DATASET__NUM_SHOTS=4))
    assert dataset.classnames == [f"class {i}" for i in names] and dataset.train_x == []


def test_attribute_names_and_prompts_of_the_config(make_data: MakeData, make_cfg: MakeCfg) -> None:
    Toy.splits = (make_data([0, 1]),) * 3
    dataset = Toy(make_cfg(DATASET__ATTRIBUTE_NAMES=("sea", "hill")))
    assert dataset.attribute_prompts == [("a photo of sea.",), ("a photo of hill.",)]
    prompts = {"DATASET__ATTRIBUTE_NAMES": ("sea",), "DATASET__ATTRIBUTE_PROMPTS": ("a lake | the sea",)}
    assert Toy(make_cfg(**prompts)).attribute_prompts == [("a lake", "the sea")]
    with pytest.raises(UserError, match="ATTRIBUTE_NAMES has 0 entries and DATASET.ATTRIBUTE_PROMPTS 1"):
        Toy(make_cfg(DATASET__ATTRIBUTE_PROMPTS=("a lake",)))
    with pytest.raises(UserError, match="TEMPLATE 'a photo' has no {}"):
        Toy(make_cfg(DATASET__TEMPLATE="a photo"))


def test_missing_images_and_roots_are_users_errors(make_cfg: MakeCfg, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no image at /nowhere\.png"):
        Datum("/nowhere.png")
    with pytest.raises(UserError, match="Toy needs the folder of the data sets: give --root"):
        Toy.root(get_cfg_default())
    with pytest.raises(UserError, match=f"--root: there is no folder {tmp_path / 'gone'}"):
        Toy.root(make_cfg(DATASET__ROOT=str(tmp_path / "gone")))


# --- transforms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (30, 40)])
def test_test_transform_is_clips(size: tuple[int, int]) -> None:
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    cfg = get_cfg_default()
    cfg.INPUT.update({"INTERPOLATION": "bicubic", "TRANSFORMS": RANDOM, "PIXEL_MEAN": mean, "PIXEL_STD": std})
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    resize = T.Resize(224, interpolation=T.InterpolationMode.BICUBIC)
    clips = T.Compose([resize, T.CenterCrop(224), T.ToTensor(), T.Normalize(mean, std)])
    assert torch.equal(build_transform(cfg, is_train=False)(image), clips(image))


def test_training_transform_squeezes_unless_it_crops(make_cfg: MakeCfg) -> None:
    image = Image.fromarray(np.arange(100 * 60 * 3, dtype=np.uint8).reshape(100, 60, 3))
    plain = build_transform(make_cfg(INPUT__SIZE=(24, 32), INPUT__TRANSFORMS=()))
    assert torch.equal(plain(image), T.ToTensor()(T.Resize((24, 32))(image)))
    kinds = [type(step).__name__ for step in build_transform(make_cfg(INPUT__TRANSFORMS=RANDOM)).transforms]
    wanted = "RandomResizedCrop RandomHorizontalFlip ColorJitter ToTensor _Cutout Normalize _GaussianNoise"
    assert kinds == wanted.split()
    assert [is_random(make_cfg(INPUT__TRANSFORMS=t)) for t in (RANDOM, ("normalize", "center_crop"))] == [True, False]
    assert not is_random(make_cfg(INPUT__TRANSFORMS=RANDOM, INPUT__NO_TRANSFORM=True))


# --- samplers --------------------------------------------------------------------------------------------------


def epochs_of(cfg: object, data: list[Datum], is_train: bool, rank: int, processes: int) -> list[list[list]]:
    batches = EpochBatches(cfg, data, is_train, rank, processes)
    result = []
    for batches.epoch in range(2):
        result.append(list(batches))
        assert len(batches) == len(result[-1])
    return result


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("count", [1, 2, 5, 7, 12, 13, 14, 15])
def test_slices_of_processes_make_up_the_one_batch(
    make_cfg: MakeCfg, make_data: MakeData, processes: int, is_train: bool, count: int
) -> None:
    data = make_data([0] * count)
    part = make_cfg(DATALOADER__TRAIN_X__BATCH_SIZE=2, DATALOADER__TEST__BATCH_SIZE=2)
    whole = make_cfg(DATALOADER__TRAIN_X__BATCH_SIZE=2 * processes, DATALOADER__TEST__BATCH_SIZE=2 * processes)
    slices = [epochs_of(part, data, is_train, rank, processes) for rank in range(processes)]
    for epoch, batches in enumerate(epochs_of(whole, data, is_train, 0, 1)):
        assert [[*chain(*parts)] for parts in zip(*(s[epoch] for s in slices), strict=True)] == batches
        sizes = [len(batch) for batch in batches]
        assert sum(sizes) == (count - count % (2 * processes) if is_train and count >= 2 * processes else count)
        assert max(sizes) - min(sizes) == 0 or not is_train
        assert all(abs(len(s[epoch][-1]) - sizes[-1] / processes) < 1 for s in slices)


def test_orders_depend_on_seed_and_epoch(make_cfg: MakeCfg, make_data: MakeData) -> None:
    data = make_data([0] * 15)
    first, second = epochs_of(make_cfg(), data, True, 0, 1)
    assert first != second
    assert sorted(i for batch in first for i, _ in batch) == list(range(15))
    assert epochs_of(make_cfg(), data, True, 0, 1) == [first, second]
    assert epochs_of(make_cfg(SEED=2), data, True, 0, 1)[0] != first
    test = [i for batch in epochs_of(make_cfg(), data, False, 0, 1)[1] for i, _ in batch]
    assert test == list(range(15))


def test_random_class_sampler_fills_batches_with_n_ins_of_each_class(make_data: MakeData) -> None:
    labels = [0] * 9 + [1] * 5 + [2] * 2 + [3] * 8
    order = epoch_order("RandomClassSampler", make_data(labels), 8, np.random.default_rng(0), n_ins=4)
    assert len(order) % 8 == 0
    assert len(order) >= len(labels)
    for start in range(0, len(order), 8):
        assert sorted(Counter(labels[i] for i in order[start : start + 8]).values()) == [4, 4]
    assert {labels[i] for i in order} == {0, 1, 2, 3}


@pytest.mark.parametrize(("n_domain", "batch", "each"), [(0, 6, 2), (2, 6, 3), (-1, 3, 1)])
def test_random_domain_sampler_fills_batches_evenly(
    make_cfg: MakeCfg, make_data: MakeData, n_domain: int, batch: int, each: int
) -> None:
    domains = [0] * 9 + [1] * 5 + [7] * 6
    keys = {"SAMPLER": "RandomDomainSampler", "N_DOMAIN": n_domain, "BATCH_SIZE": batch}
    cfg = make_cfg(**{f"DATALOADER__TRAIN_X__{key}": value for key, value in keys.items()})
    for epoch in epochs_of(cfg, make_data([0] * 20, domains), True, 0, 1):
        drawn = [i for batch in epoch for i, _ in batch]
        assert len(drawn) == len(set(drawn))
        assert len(epoch) >= 1
        for part in epoch:
            assert set(Counter(domains[i] for i, _ in part).values()) == {each}
            assert len(part) == batch


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("TRAIN_X", {"SAMPLER": "RandomClassSampler", "N_INS": 9}, "cannot fill batches of 8 from 2 classes.*N_INS 9"),
        (
            "TRAIN_X",
            {"SAMPLER": "RandomClassSampler", "N_INS": 3},
            "batches of 8 do not divide into 2 classes of N_INS 3",
        ),
        ("TRAIN_X", {"SAMPLER": "RandomDomainSampler", "N_DOMAIN": 4}, "8 from 3 domains with N_DOMAIN 4"),
        ("TRAIN_X", {"SAMPLER": "RandomDomainSampler"}, "batches of 8 do not divide into 3 domains"),
        ("TRAIN_X", {"SAMPLER": "RandomDomainSampler", "BATCH_SIZE": 9}, "domain 2 has 2 images, fewer than the 3"),
    ],
)
def test_impossible_samplers(
    make_cfg: MakeCfg, make_data: MakeData, section: str, keys: dict[str, object], message: str
) -> None:
    data = make_data([0] * 6 + [1] * 6, domains=[0] * 5 + [1] * 5 + [2] * 2)
    cfg = make_cfg(**{f"DATALOADER__{section}__{key}": value for key, value in ({"BATCH_SIZE": 8} | keys).items()})
    with pytest.raises(UserError, match=message):
        len(EpochBatches(cfg, data, section == "TRAIN_X"))


# --- loaders ---------------------------------------------------------------------------------------------------


def test_batches_are_the_same_with_and_without_workers(make_cfg: MakeCfg) -> None:
    one, two = (DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM, DATALOADER__NUM_WORKERS=n)) for n in (0, 2))
    for a, b in zip(batches_of(one.train_loader_x, 3), batches_of(two.train_loader_x, 3), strict=True):
        assert a.keys() == b.keys() == {"img", "label", "domain", "attribute", "impath", "index"}
        assert a["impath"] == b["impath"]
        assert all(torch.equal(a[key], b[key]) for key in a if key != "impath")
        assert a["img"].shape == (5, 3, 48, 48)


def test_batches_carry_what_the_list_says(make_cfg: MakeCfg) -> None:
    dm = DataManager(make_cfg())
    (batch, *_) = batches_of(dm.train_loader_x)
    for row, i in enumerate(batch["index"].tolist()):
        datum = dm.dataset.train_x[i]
        assert (datum.impath, datum.label) == (batch["impath"][row], int(batch["label"][row]))
        assert (datum.domain, datum.attribute) == (int(batch["domain"][row]), int(batch["attribute"][row]))
        assert torch.equal(batch["img"][row], dm.transform_train(read_image(datum.impath)))


def test_pixels_depend_on_the_epoch_and_the_image_alone(make_cfg: MakeCfg) -> None:
    loader = DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM)).train_loader_x
    first = batches_of(loader, 1)
    torch.manual_seed(99)
    again, other = batches_of(loader, 1), batches_of(loader, 2)
    assert all(torch.equal(a["img"], b["img"]) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0]["img"], other[0]["img"])
    sliced = DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM, DATALOADER__TRAIN_X__BATCH_SIZE=2), 1, 2).train_loader_x
    pixels = {int(i): image for batch in first for i, image in zip(batch["index"], batch["img"], strict=True)}
    shared = [(i, image) for b in batches_of(sliced, 1) for i, image in zip(b["index"].tolist(), b["img"], strict=True)]
    assert all(torch.equal(image, pixels[i]) for i, image in shared if i in pixels)
    assert len(shared) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_draws_nothing_from_the_global_generators(make_cfg: MakeCfg, workers: int) -> None:
    loader = DataManager(make_cfg(INPUT__TRANSFORMS=RANDOM, DATALOADER__NUM_WORKERS=workers)).train_loader_x
    states = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].copy()
    batches_of(loader)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_a_process_without_images_gets_an_empty_batch(make_cfg: MakeCfg) -> None:
    loader = DataManager(make_cfg(DATALOADER__TEST__BATCH_SIZE=3, DATASET__SHAPES__NUM_TEST=8), 2, 3).test_loader
    (batch,) = batches_of(loader)
    assert batch["img"].shape[0] == 2
    loader = DataManager(make_cfg(DATASET__SHAPES__NUM_VAL=4, DATALOADER__TEST__BATCH_SIZE=1), 2, 3).val_loader
    assert [batch["img"].shape for batch in batches_of(loader)] == [(1, 3, 48, 48), (0, 3, 48, 48)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["truncated png", "truncated jpg", "empty", "text", "gone"])
def test_bad_images_are_named(
    make_cfg: MakeCfg,
    make_data: MakeData,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    workers: int,
    fault: str,
) -> None:
    path = tmp_path / f"bad.{fault[-3:]}"
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "jpeg" if fault.endswith("jpg") else "png")
    path.write_bytes({"empty": b"", "text": b"no image"}.get(fault, buffer.getvalue()[:900]))
    Toy.splits = ([*make_data([0, 0, 0]), Datum(str(path))],) * 3
    monkeypatch.setitem(DATASET_REGISTRY._objects, "Toy", Toy)
    dm = DataManager(make_cfg(DATASET__NAME="Toy", DATALOADER__NUM_WORKERS=workers))
    if fault == "gone":
        path.unlink()
    for loader in (dm.train_loader_x, dm.test_loader):
        with pytest.raises(UserError) as error:
            batches_of(loader)
        assert str(error.value).startswith(f"cannot read the image {path}: ")
        assert "\n" not in str(error.value)


def test_images_of_every_mode_become_rgb(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK", "I"):
        path = tmp_path / f"{mode}.tiff"
        Image.new(mode, (5, 4)).save(path)
        assert (read_image(str(path)).mode, read_image(str(path)).size) == ("RGB", (5, 4))


def test_data_manager_sums_up_and_warns(make_cfg: MakeCfg, capsys: pytest.CaptureFixture[str]) -> None:
    dm = DataManager(make_cfg(INPUT__TRANSFORMS=()))
    assert "no 'normalize'" in capsys.readouterr().out
    summary = dict(dm.summary())
    assert (summary["# classes"], summary["# train_x"], summary["# val"], summary["# test"]) == ("2", "22", "4", "8")
    assert summary["# train_x: circle / land"] == "1"
    with pytest.raises(UserError, match="unknown data set 'Shapes'"):
        DataManager(make_cfg(DATASET__NAME="Shapes"))


@pytest.mark.parametrize(("mib", "read_again"), [(0.0, 22), (1000.0, 0), (10 * 48 * 48 * 3 / 2**20, 12)])
def test_kept_images_are_read_once_and_the_same(
    make_cfg: MakeCfg, monkeypatch: pytest.MonkeyPatch, mib: float, read_again: int
) -> None:
    cfg = make_cfg(DATALOADER__IMAGE_CACHE_MIB=mib, DATALOADER__TRAIN_X__BATCH_SIZE=22)
    plain, keeping = (DataManager(cfg).train_loader_x for _ in range(2))
    keeping.cache_images()
    first = batches_of(keeping)
    read: list[str] = []
    monkeypatch.setattr(
        "oodprompt.data.loading.read_image", lambda path, rules: (read.append(path), read_image(path))[1]
    )
    again = batches_of(keeping)
    assert len(read) == read_again
    for batches in (first, again):
        assert torch.equal(pixels_by_index(batches), pixels_by_index(batches_of(plain)))


@pytest.mark.parametrize(("names", "keeps"), [(("normalize",), 22), (("normalize", "instance_norm"), 5)])
def test_workers_share_kept_images(make_cfg: MakeCfg, tmp_path: Path, names: tuple[str, ...], keeps: int) -> None:
    mib = 22 * 48 * 48 * 3 / 2**20  # 22 images in bytes, 5 in floats
    cfg = make_cfg(DATALOADER__NUM_WORKERS=2, INPUT__TRANSFORMS=names, DATALOADER__IMAGE_CACHE_MIB=mib)
    data = DataManager(cfg)
    images = [Datum(shutil.copy(datum.impath, tmp_path / f"{i}.png")) for i, datum in enumerate(data.dataset.train_x)]
    loader = data.loader(images)
    loader.cache_images()
    first = pixels_by_index(batches_of(loader))
    for datum in images[:keeps]:
        Path(datum.impath).unlink()
    assert torch.equal(pixels_by_index(batches_of(loader, 1)), first)
    if keeps < len(images):
        Path(images[keeps].impath).unlink()
        with pytest.raises(UserError, match=f"cannot read the image {images[keeps].impath}"):
            batches_of(loader, 2)


def test_images_are_kept_where_the_tower_trains_and_nothing_is_random(build_trainer_of: Callable[..., Any]) -> None:
    assert build_trainer_of("VPT").train_loader_x.dataset.kept.number > 0
    assert build_trainer_of("VPT").val_loader.dataset.kept.number > 0
    assert build_trainer_of("VPT", INPUT__TRANSFORMS=RANDOM).train_loader_x.dataset.kept.number == 0
    assert build_trainer_of("CoOp").train_loader_x.dataset.kept.number == 0
    assert build_trainer_of("CoOp", DATALOADER__FEATURE_CACHE="off").train_loader_x.dataset.kept.number > 0


@pytest.fixture
def build_trainer_of(make_cfg: MakeCfg, tmp_path: Path) -> Callable[..., Any]:
    return lambda name, **keys: build_trainer(make_cfg(TRAINER__NAME=name, OUTPUT_DIR=str(tmp_path / "out"), **keys))


def test_caption_stays_with_a_relabelled_image(make_data: MakeData) -> None:
    datum = Datum(make_data([0])[0].impath, 3, caption="a cat on a mat")
    assert datum.relabelled(1).caption == "a cat on a mat" and datum.relabelled(1).label == 1
