"""Image features in place of images: the same results, and one clear error for each thing that may be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from oodprompt import extracting
from oodprompt.backbones import load_backbone
from oodprompt.backbones.weights import digest
from oodprompt.config.extensions import register_all
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.dataset import build_dataset
from oodprompt.data.feature_files import read_feature_file, write_features
from oodprompt.engine.check import check_run
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.errors import UserError
from oodprompt.features import views
from tests.helpers.runs import SMALL, no_pictures
from tests.helpers.small_data import TINY

Build = Callable[..., CfgNode]
SHORT = {
    **dict(zip(SMALL[::2], SMALL[1::2], strict=True)),
    "OPTIM.LR": 0.01,
    "OPTIM.MAX_EPOCH": 2,
}
ANCHOR = {"TRAINER.NAME": "CoOpOOD", "TRAINER.COOPOOD.ANCHOR": "attributes"}
register_all()
NEED_PIXELS = {
    "VPT": "VPT changes how images are encoded",
    "MaPLe": "MaPLe changes how images are encoded",
    "IVLP": "IVLP changes how images are encoded",
    "PromptSRC": "PromptSRC changes how images are encoded",
    "FineTune": "FineTune changes how images are encoded",
    "RaVL": "RaVL takes regions of images",
}
OWN = [name for name, trainer in TRAINER_REGISTRY.items() if trainer.__module__.startswith("oodprompt.trainers")]


@pytest.fixture(scope="module")
def files(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The features of a small ShapesOnScenes in both formats."""
    folder = tmp_path_factory.mktemp("features")
    cfg = _cfg(data_root, {"OUTPUT_DIR": str(folder / "run")})
    return {ending: extracting.extract(cfg, folder / f"shapes.{ending}") for ending in ("npz", "safetensors")}


def _cfg(root: Path, keys: dict[str, Any]) -> CfgNode:
    from oodprompt.config.keys import get_cfg_default, set_key

    cfg = get_cfg_default()
    for name, value in {**TINY, **SHORT, "TRAINER.NAME": "CoOp", "DATASET.ROOT": str(root), **keys}.items():
        set_key(cfg, name, value, "test")
    cfg.freeze()
    return cfg


def given(file: Path) -> dict[str, Any]:
    return {"DATASET.NAME": "Features", "DATASET.FEATURES.FILE": str(file)}


def trained(root: Path, keys: dict[str, Any], folder: Path) -> tuple[PromptTrainer, Tensor]:
    """A trained run and its logits on the test images."""
    with no_pictures():
        trainer = build_trainer(_cfg(root, {**keys, "OUTPUT_DIR": str(folder)}))
        trainer.train()
    trainer.trained.set_mode(training=False)
    return trainer, trainer.encoder.outputs("test", trainer.learner, trainer.objective.predict)[1]


def assert_same(root: Path, file: Path, keys: dict[str, Any], folder: Path) -> None:
    one, a = trained(root, keys, folder / "images")
    other, b = trained(root, keys | given(file), folder / "features")
    assert one.dataset.has_pixels and not other.dataset.has_pixels
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for x, y in zip(one.models(), other.models(), strict=True):
        for name, value in x.state_dict().items():
            torch.testing.assert_close(value, y.state_dict()[name], rtol=1e-5, atol=1e-5, msg=name)
    for split in ("train", "val", "test"):
        x, y = one.evaluate(split), other.evaluate(split)
        assert x["groups"] == y["groups"] and x["other_predictions"] == y["other_predictions"]


@pytest.mark.parametrize(("ending", "keys"), [("npz", ANCHOR), ("safetensors", {"TRAINER.NAME": "DFR"})])
def test_results_are_those_of_the_images(
    ending: str, keys: dict[str, Any], data_root: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert_same(data_root, files[ending], keys, tmp_path)


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.parametrize("name", [name for name in OWN if name not in NEED_PIXELS])
def test_results_of_every_method_are_those_of_the_images(
    name: str, data_root: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert_same(data_root, files["npz"], {"TRAINER.NAME": name, "OPTIM.MAX_EPOCH": 3}, tmp_path)


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.parametrize("name", ["IVLP", "PromptSRC"])
def test_results_without_visual_prompts_are_those_of_the_images(
    name: str, data_root: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    keys = {"TRAINER.NAME": name, f"TRAINER.{name.upper()}.PROMPT_DEPTH_VISION": 0}
    assert_same(data_root, files["npz"], keys, tmp_path)


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.parametrize("base", [n for n in OWN if TRAINER_REGISTRY.get(n).learner_class and n not in NEED_PIXELS])
@pytest.mark.parametrize("keys", [ANCHOR, {"TRAINER.NAME": "DebiasedPT"}, {"TRAINER.NAME": "GroupDRO"}])
def test_results_of_debiasers_over_every_base_are_those_of_the_images(
    base: str, keys: dict[str, Any], data_root: Path, files: dict[str, Path], tmp_path: Path
) -> None:
    assert_same(data_root, files["safetensors"], keys | {"TRAINER.BASE": base}, tmp_path)


@pytest.mark.parametrize("name", NEED_PIXELS)
def test_methods_that_need_pixels_are_refused_by_name(name: str, data_root: Path, files: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=f"^{NEED_PIXELS[name]}, and Features has image features alone; train on"
    ) as error:
        build_trainer(_cfg(data_root, given(files["npz"]) | {"TRAINER.NAME": name}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys", [{**ANCHOR, "TRAINER.COOPOOD.ANCHOR": "regions"}, {"TRAINER.NAME": "GroupDRO", "TRAINER.GROUPS": "regions"}]
)
def test_discovery_is_refused(keys: dict[str, Any], data_root: Path, files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^discovery looks at regions of images, and Features has image features alone"):
        trained(data_root, given(files["npz"]) | keys, tmp_path)


def test_random_transforms_change_nothing(
    data_root: Path, files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = given(files["npz"])
    _, plain = trained(data_root, keys, tmp_path / "plain")
    words = {"INPUT.TRANSFORMS": ("random_flip", "normalize"), "DATALOADER.FEATURE_CACHE": "off"}
    _, other = trained(data_root, keys | words, tmp_path / "random")
    assert torch.equal(plain, other)
    assert "INPUT.TRANSFORMS change nothing" in capsys.readouterr().out


# --- files -------------------------------------------------------------------------------------------------------


def test_large_tables_are_mapped_and_read_row_by_row(
    files: dict[str, Path], data_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What exceeds the memory allowed stays in its file, and gives the same run."""
    _, expected = trained(data_root, given(files["npz"]), tmp_path / "memory")
    asked: list[int] = []
    rows = views.VectorRows.__getitem__
    monkeypatch.setattr(
        views.VectorRows, "__getitem__", lambda self, index: (asked.append(len(index)), rows(self, index))[1]
    )
    for ending, file in files.items():
        trainer, found = trained(data_root, given(file) | {"DATALOADER.CACHE_MEMORY_MIB": 0.0}, tmp_path / ending)
        assert torch.equal(found, expected)
        assert max(asked) <= 16  # a batch at a time
        asked.clear()


def test_a_mapped_npz_takes_no_memory(tmp_path: Path) -> None:
    z = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float32)
    np.savez(tmp_path / "a.npz", image_features=z)
    np.savez_compressed(tmp_path / "b.npz", image_features=z)
    np.savez(tmp_path / "c.npz", image_features=np.asfortranarray(z), label=np.arange(50))
    mapped, unpacked, fortran = (read_feature_file(tmp_path / f"{name}.npz").features for name in "abc")
    for values in (mapped, unpacked, fortran):
        np.testing.assert_array_equal(values.numpy(), z)
    base = mapped.numpy()
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else f"{tmp_path}/a.npz"
    assert f"{tmp_path}/a.npz" in maps and f"{tmp_path}/b.npz" not in maps


def small(**entries: Any) -> dict[str, Any]:
    """Features of ``tiny`` with nothing wrong, but for ``entries`` (None: left out)."""
    z = np.random.default_rng(0).standard_normal((12, 128)).astype(np.float32)
    content = {
        "image_features": z,
        "label": np.arange(12) % 2,
        "split": np.array(["train"] * 6 + ["val"] * 2 + ["test"] * 4),
        "attribute": np.arange(12) // 2 % 2,
        "class_names": np.array(["cat", "dog"]),
        "attribute_names": np.array(["land", "water"]),
        **entries,
    }
    return {name: value for name, value in content.items() if value is not None}


def opened(make_cfg: Build, file: Path, **keys: Any) -> Any:
    return build_dataset(make_cfg(**{"DATASET.NAME": "Features", "DATASET.FEATURES.FILE": str(file)}, **keys))


def changed(**entries: Any) -> Callable[[], dict[str, Any]]:
    return lambda: small(**entries)


def with_row(row: int, value: float, dtype: Any = np.float32) -> np.ndarray:
    z = small()["image_features"].astype(dtype)
    z[row] = value
    return z


WRONG = [
    (changed(image_features=with_row(9, np.nan)), r"row 9 of image_features is not finite \(NaN or infinity\); take"),
    (changed(image_features=with_row(3, 0)), "row 3 of image_features is zero"),
    (changed(image_features=np.arange(24).reshape(12, 2)), r"must be floats \[N, d\], not int64 \[12, 2\]"),
    (changed(image_features=np.zeros((12, 2, 3), np.float32)), r"must be floats \[N, d\], not float32 \[12, 2, 3\]"),
    (changed(image_features=np.array(["a"] * 12)), r"must be floats \[N, d\]"),
    (changed(image_features=None), "has no entry 'image_features'"),
    (changed(label=None), "has no entry 'label'; give it one value for each row"),
    (changed(label=np.arange(11) % 2), r"label must have one entry for each of the 12 rows .* not the shape \[11\]"),
    (changed(label=np.arange(12) % 3), "row 2 has the label 2, but class_names has 2 entries, 0 to 1"),
    (changed(label=np.array(["cat", "dgo"] * 6)), "row 1 has the label 'dgo': did you mean 'dog'?"),
    (changed(label=np.arange(12) % 2 * 1.0), "label must be whole numbers or words, not float64"),
    (changed(class_names=None), "numbered labels and no class_names"),
    (
        changed(class_names=np.array(["cat", "cat"]), label=np.array(["cat"] * 12)),
        "holds a name twice, cat, and labels are",
    ),
    (changed(label=np.array(["cat", "nan"] * 6), class_names=None), "row 1 has the label 'nan', which says that it is"),
    (changed(label=np.array(["cat", " "] * 6)), "row 1 has the label ' ', which says that it is not known"),
    (changed(class_names=np.array(["cat", "dog", "cow"])), "class 'cow' has no training row"),
    (changed(split=None), "has no entry 'split': give train, val or test for each row"),
    (changed(split=np.array(["train"] * 11 + ["tset"])), "row 11 has the split 'tset'; use train, val, test"),
    (changed(split=np.array(["train"] * 12)), "no row has the split test"),
    (changed(attribute=np.arange(12) % 3), "row 2 has the attribute 2, but attribute_names has 2 entries"),
    (changed(attribute=np.array(["land", "watre"] * 6)), "row 1 has the attribute 'watre': did you mean 'water'?"),
    (changed(image_feature=np.ones(3)), "unknown entry 'image_feature': did you mean 'image_features'?"),
    (changed(label=np.array([{}] * 12)), "arrays of Python objects are not read"),
]


@pytest.mark.parametrize(("content", "error"), WRONG, ids=[error[:40] for _, error in WRONG])
def test_what_is_wrong_with_a_file_is_said(
    content: Callable[[], dict[str, Any]], error: str, make_cfg: Build, tmp_path: Path
) -> None:
    np.savez(tmp_path / "f.npz", **content())
    with pytest.raises(UserError, match=error) as raised:
        opened(make_cfg, tmp_path / "f.npz")
    assert str(tmp_path / "f.npz") in str(raised.value) and "\n" not in str(raised.value)


def test_names_that_may_be(make_cfg: Build, tmp_path: Path) -> None:
    """Two classes of one name, as ImageNet has them; and names that elsewhere say that a value is missing."""
    file = write_features(tmp_path / "f.npz", **small(class_names=["missile", "missile"]))
    assert opened(make_cfg, file).classnames == ["missile", "missile"]
    words = np.array(["NA", "None"] * 6)
    names = {"class_names": ["NA", "None"], "attribute_names": ["None", "NA"]}
    data = opened(make_cfg, write_features(tmp_path / "g.npz", **small(label=words, attribute=words, **names)))
    assert data.test.label.tolist() == [0, 1, 0, 1] and data.test.attribute.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_what_a_table_has_can_be_written(ending: str, make_cfg: Build, tmp_path: Path) -> None:
    """Columns of pandas have objects of Python, some of them missing."""
    labels = pd.Series(["cat", "dög"] * 6)
    words = {"class_names": pd.Index(["cat", "dög"]), "attribute_names": None, "image": [Path("a.png"), None] * 6}
    table = pd.DataFrame(small()["image_features"])
    one = small(image_features=table, label=labels, attribute=["x", None, "y", float("nan")] * 3, **words)
    data = opened(make_cfg, write_features(tmp_path / f"f.{ending}", **one))
    assert data.classnames == ["cat", "dög"] and data.test.attribute.tolist() == [0, -1, 1, -1]
    numbers = pd.Series([0, None] * 6, dtype="Int64")
    other = small(label=np.char.encode(labels.tolist(), "utf-8"), attribute=numbers, class_names=None)
    data = opened(make_cfg, write_features(tmp_path / f"g.{ending}", **other))
    assert data.classnames == ["cat", "dög"] and data.test.attribute.tolist() == [0, -1, 0, -1]
    file = write_features(tmp_path / f"h.{ending}", **small(domain=["one"] * 12))
    assert read_feature_file(file).rows["domain"].tolist() == ["one"] * 12


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ({"label": ["cat", None] * 6}, "entry 1 of label is missing; give a value, or take the row out"),
        ({"class_names": pd.Series(["cat", None])}, "entry 1 of class_names is missing"),
        ({"label": np.array(["cat", {}] * 6, object)}, "entry 1 of label is a dict; give a word or a whole number"),
        ({"label": [["cat"], ["cat", "dog"]]}, "the entries of label differ in length"),
        ({"image_features": pd.DataFrame({"a": ["x"] * 12})}, r"image_features must be floats \[N, d\], not object"),
        ({"image_features": [torch.ones(2), torch.ones(3)]}, "the entries of image_features differ in length"),
    ],
)
def test_what_cannot_be_written(entries: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=error):
        write_features(tmp_path / "f.npz", **small(**entries))


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_files_that_are_none(ending: str, make_cfg: Build, tmp_path: Path) -> None:
    file = tmp_path / f"f.{ending}"
    with pytest.raises(UserError, match="no file .* expected"):
        opened(make_cfg, file)
    file.write_bytes(b"not one" * 40)
    with pytest.raises(UserError, match=rf"cannot be read as \.{ending}: "):
        opened(make_cfg, file)


@pytest.mark.parametrize(
    ("made_by", "error"),
    [
        ({"backbone": "ViT-B/16"}, "made by the backbone ViT-B/16, not by tiny; give --backbone ViT-B/16"),
        ({"backbone": "tiny", "backbone_digest": "0" * 64}, "with other weights than tiny has now"),
        ({"backbone_digest": "0" * 64}, "made by the backbone with the digest 000000000000, not by tiny"),
        ({"image_features": np.ones((12, 5), np.float16)}, "have 5 entries each, but those of tiny have 128"),
    ],
)
def test_features_of_another_backbone_are_refused(
    made_by: dict[str, Any], error: str, data_root: Path, tmp_path: Path
) -> None:
    file = write_features(tmp_path / "f.npz", **small(**made_by))
    with pytest.raises(UserError, match=error):
        build_trainer(_cfg(data_root, given(file)))


def test_the_digest_counts_where_names_differ(data_root: Path, tmp_path: Path) -> None:
    content = small(backbone="our copy of tiny", backbone_digest=digest(load_backbone("tiny").visual))
    file = write_features(tmp_path / "f.safetensors", **content)
    build_trainer(_cfg(data_root, given(file)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", "bfloat16"])
def test_every_floating_type_and_any_length(dtype: Any, make_cfg: Build, tmp_path: Path) -> None:
    z = small()["image_features"] * np.arange(1, 13)[:, None]
    table = torch.from_numpy(z).bfloat16() if dtype == "bfloat16" else z.astype(dtype)
    if dtype == ">f4":
        np.savez(tmp_path / "f.npz", **small(image_features=table))
    else:
        write_features(tmp_path / ("f.safetensors" if dtype == "bfloat16" else "f.npz"), **small(image_features=table))
    data = opened(make_cfg, next(tmp_path.iterdir()))
    found = data.test.vectors.rows(data.test.rows)
    np.testing.assert_allclose(
        found, (z / np.linalg.norm(z, axis=1, keepdims=True))[8:], atol=1e-2 if "float" in str(dtype) else 1e-6
    )
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_a_folder_of_files_named_by_their_splits(make_cfg: Build, tmp_path: Path) -> None:
    whole, order = small(split=None, label=np.array(["cat", "dog"] * 6)), {"train-a": (0, 4), "train-b": (4, 6)}
    names = {"class_names", "attribute_names"}
    for name, (start, end) in {**order, "val": (6, 8), "test": (8, 12)}.items():
        part = {key: value if key in names else value[start:end] for key, value in whole.items()}
        write_features(tmp_path / f"{name}.npz", **part)
    data = opened(make_cfg, tmp_path)
    assert [len(split) for split in (data.train_x, data.val, data.test)] == [6, 2, 4]
    z = whole["image_features"] / np.linalg.norm(whole["image_features"], axis=1, keepdims=True)
    for split, rows in ((data.train_x, z[:6]), (data.val, z[6:8]), (data.test, z[8:])):
        np.testing.assert_allclose(split.vectors.rows(split.rows), rows, atol=1e-6)
    shuffled = np.array([5, 0, 4, 1])
    np.testing.assert_allclose(data.train_x.vectors.rows(data.train_x.rows[shuffled]), z[shuffled], atol=1e-6)
    assert data.train_x.label.tolist() == [0, 1] * 3 and data.train_x.impath(4).endswith("train-b.npz[0]")
    write_features(tmp_path / "test.npz", **{**small(split=None), "class_names": ["dog", "cat"]})
    with pytest.raises(UserError, match="have different class_names"):
        opened(make_cfg, tmp_path)


@pytest.mark.parametrize(
    ("names", "attribute", "prompts"),
    [
        ((), [0, 0, 1, 1], "a photo of land."),
        (("water", "land"), [1, 1, 0, 0], "a photo of water."),  # the same names in another order
        (("beach", "sea"), [0, 0, 1, 1], "a photo of beach."),  # other names for all
    ],
)
def test_attribute_names(
    names: tuple[str, ...], attribute: list[int], prompts: str, make_cfg: Build, tmp_path: Path
) -> None:
    file = write_features(tmp_path / "f.npz", **small())
    data = opened(make_cfg, file, **{"DATASET.ATTRIBUTE_NAMES": names})
    assert data.attribute_names == (names or ("land", "water"))
    assert data.test.attribute.tolist() == attribute and data.attribute_prompts[0] == (prompts,)
    with pytest.raises(UserError, match="give exactly these names, or others for all"):
        opened(make_cfg, file, **{"DATASET.ATTRIBUTE_NAMES": ("land", "sea")})


def test_without_attributes_or_validation(make_cfg: Build, tmp_path: Path) -> None:
    split = np.array([0] * 8 + [2] * 4)
    file = write_features(tmp_path / "f.npz", **small(split=split, attribute=None, attribute_names=None))
    data = opened(make_cfg, file, **{"DATASET.VAL_PERCENT": 0.25, "DATASET.ATTRIBUTE_NAMES": ("land", "water")})
    assert (len(data.train_x), len(data.val)) == (6, 2) and not data.has_attributes
    assert data.attribute_names == ("land", "water")
    unknown = write_features(tmp_path / "g.npz", **small(attribute=np.array(["land", "", "water", "nan"] * 3)))
    assert opened(make_cfg, unknown).test.attribute.tolist() == [0, -1, 1, -1]


def test_the_check_without_training(make_cfg: Build, tmp_path: Path) -> None:
    data = opened(make_cfg, write_features(tmp_path / "f.npz", **small()))
    assert "all 12 rows of image features are in order; nothing" in check_run(
        make_cfg(), data, load_backbone("tiny").tokenizer
    )


def test_the_command_writes_what_it_says(data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for name, value in {**TINY, **SHORT}.items() for word in (name, str(value))]
    file = tmp_path / "f.npz"
    assert extracting.main(["--root", str(data_root), "--dtype", "float16", "--output", str(file), *words]) == 0
    assert f"Wrote {file}" in capsys.readouterr().out
    found = read_feature_file(file)
    assert found.features.dtype == torch.float16 and found.words["backbone"] == "tiny"
    assert extracting.main(["--output", str(tmp_path / "f.csv"), *words]) == 2
    assert "ends in .npz or .safetensors" in capsys.readouterr().err


def test_without_a_config_file_images_are_prepared_as_for_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[CfgNode] = []
    monkeypatch.setattr(extracting, "extract", lambda cfg, *_: made.append(cfg) or __file__)
    monkeypatch.setenv("OODPROMPT_IMPORT", "")
    extracting.run(["--backbone", "ViT-L/14@336px", "--output", "f.npz", "DATALOADER.TEST.BATCH_SIZE", "7"])
    keys = made[0].INPUT
    assert (keys.INTERPOLATION, tuple(keys.TRANSFORMS), tuple(keys.SIZE)) == ("bicubic", ("normalize",), (336, 336))
    assert keys.PIXEL_MEAN[0] == 0.48145466 and made[0].DATALOADER.TEST.BATCH_SIZE == 7
