"""Sources of groups: what each finds where there is something to find, what it refuses, and that runs keep it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.coop_ood import CoOpOOD
from oodprompt.trainers.debiased_pt import DebiasedPT
from oodprompt.trainers.dfr import DFR
from oodprompt.trainers.group_coop import GroupCoOp
from oodprompt.trainers.group_dro import GroupDRO
from oodprompt.trainers.resampling import RWG, SUBG
from torch import Tensor

from oodprompt.config.keys import get_cfg_default, set_key
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.engine.first_stage import FirstStage
from oodprompt.engine.kept_groups import FILE, KeptGroups
from oodprompt.engine.loop import RunState
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import GroupSource, Step
from oodprompt.methods.heads import Head
from oodprompt.methods.quality import group_quality
from oodprompt.methods.sources.few_labels import confident
from oodprompt.methods.splits import LabelledData, Split
from tests.helpers.resampling import TINY, assert_resumes
from tests.helpers.runs import Arguments, Build, Run

COMPUTED = ("errors", "eiil", "spare", "clusters", "ssa")
SHORT = ["DATASET.SHAPES.NUM_TRAIN", 40, "DATASET.SHAPES.NUM_VAL", 16, "OPTIM.MAX_EPOCH", 1]
SHORT += ["TRAINER.GROUP_SOURCES.EIIL.STEPS", 20, "TRAINER.GROUP_SOURCES.CLUSTERS.K_MAX", 3]


def planted(name: str, n: int, seed: int, values: int = 2) -> Split:
    """Images whose features are one blob for each class and attribute; the attribute goes with the class."""
    rng = np.random.default_rng(seed)
    label = torch.arange(n) % 2
    rare = torch.from_numpy(rng.random(n) < 0.2)
    attribute = torch.where(rare, 1 - label, label) + (
        torch.from_numpy(rng.random(n) < 0.3).long() if values > 2 else 0
    )
    centres = torch.eye(16)
    z = F.normalize(
        centres[label] + 3 * centres[8 + attribute] + 0.1 * torch.from_numpy(rng.normal(size=(n, 16))).float()
    )
    return Split(name, label, attribute, lambda: z, lambda: [f"/data/set/{name}/{i}.png" for i in range(n)])


class _Stage:
    """A first model that goes by the attribute alone: right where it is that of the class."""

    def __init__(self, *splits: Split) -> None:
        noise = {s.name: 0.1 * torch.randn(len(s.label), generator=torch.Generator().manual_seed(0)) for s in splits}
        self.logits = {
            s.name: torch.stack(
                [1.0 - 2.0 * s.attribute.clamp(max=1) + noise[s.name], torch.zeros(len(s.label))], dim=1
            )
            for s in splits
        }

    def fit(self, epochs: int, choose: Tensor | None) -> tuple[str, Tensor]:
        return "learner", self.logits["train"]

    def outputs(self, split: Split, learner: str) -> tuple[Tensor, Tensor]:
        return split.features(), self.logits[split.name]


def source(name: str, train: Split, val: Split, **keys: Any) -> GroupSource:
    """The source ``name`` over planted data; ``keys`` are those of its section."""
    cfg = get_cfg_default()
    set_key(cfg, "TRAINER.GROUPS", name, "test")
    for key, value in keys.items():
        set_key(cfg, f"TRAINER.GROUP_SOURCES.{name.upper()}.{key}", value, "test")
    data = LabelledData(train, val, ["a", "b"], ["x", "y"], 1 + int(train.attribute.max()))
    seen = SimpleNamespace(pseudo=_Wrong())
    context = SimpleNamespace(data=data, attributes=seen, first_stage=_Stage(train, val), features_are_frozen=True)
    return GROUP_SOURCE_REGISTRY.get(name)(cfg, context)


@pytest.mark.parametrize("name", COMPUTED)
def test_planted_groups_are_found_and_found_again(name: str) -> None:
    train, val = planted("train", 120, 0), planted("val", 60, 1)
    keys = {"eiil": {"STEPS": 500, "LR": 0.05}, "ssa": {"SHARE": 0.5}}.get(name, {})
    ours = source(name, train, val, **keys)
    meaning = []
    for split in (train, val):
        value = ours.of(split)
        quality = group_quality(value, split.label, split.attribute)
        assert quality.worst_group_agreement == 1 and quality.num_groups == 4
        assert value.min() >= 0 and value.max() < ours.num_values(split)
        meaning.append({*zip(split.label.tolist(), split.attribute.tolist(), value.tolist(), strict=True)})
    assert meaning[0] == meaning[1]  # a value means the same in both splits
    assert torch.equal(source(name, train, val, **keys).of(train), ours.of(train))


def test_each_class_has_its_own_number_of_clusters() -> None:
    train, val = planted("train", 300, 2, values=3), planted("val", 20, 3)
    ours = source("clusters", train, val, COMPONENTS=4)
    value = ours.of(train)
    size = torch.bincount(value[train.label == 0]).tolist()
    assert size == sorted(size, reverse=True) and len(size) == len(train.attribute[train.label == 0].unique())
    assert ours.may_be_fewer and ours.num_values(train) == len(ours.names) == 10


def test_environments_are_those_of_the_highest_irm_penalty() -> None:
    train, val = planted("train", 60, 4), planted("val", 20, 5)
    ours = source("eiil", train, val, STEPS=500, LR=0.05)
    logits = 3 * torch.randn(60, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours.context.first_stage.logits["train"] = logits

    def penalty(q: Tensor) -> float:
        total = 0.0
        for share in (q, 1 - q):
            s = torch.ones((), dtype=torch.float64, requires_grad=True)
            risk = (share * F.cross_entropy(s * logits, train.label, reduction="none")).mean()
            total += float(torch.autograd.grad(risk, s)[0] ** 2)
        return total

    found = penalty(ours.of(train).double())
    rng = np.random.default_rng(0)
    assert found > 1.2 * max(penalty(torch.from_numpy(rng.random(60).round())) for _ in range(200))


def test_errors_may_be_predictions() -> None:
    train, val = planted("train", 40, 6), planted("val", 20, 7)
    predicted = train.attribute
    assert torch.equal(source("errors", train, val).of(train), (predicted != train.label).long())
    ours = source("errors", train, val, VALUE="prediction")
    assert torch.equal(ours.of(train), predicted) and ours.names == ("predicted a", "predicted b")


def test_pseudo_labels_count_by_group() -> None:
    p = np.array([0.99, 0.96, 0.5, 0.9, 0.8, 0.7, 0.6])
    group = np.array([1, 1, 1, 0, 0, 0, 3])
    labelled = np.array([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])  # 3, 1, 4 and 2 images: group 1 is the smallest
    # Two of group 1 are certain enough: it then has 3. Group 0 has 3 already, and group 3 lacks 1.
    assert confident(p, group, labelled, 0.95).tolist() == [0, 1, 6]
    assert confident(p, group, labelled, 0.4).tolist() == [0, 1, 2, 3, 6]


class _Wrong:
    """Pseudo-attributes of planted images, every fifth of which is wrong."""

    names, text = ("x", "y"), torch.eye(2)

    def of(self, split: Split) -> Tensor:
        wrong = torch.arange(len(split.label)) % 5 == 0
        return torch.where(wrong, 1 - split.attribute, split.attribute)


def test_wrong_pseudo_attributes_are_corrected() -> None:
    train, val = planted("train", 600, 6), planted("val", 60, 7)
    seen = group_quality(_Wrong().of(train), train.label, train.attribute)
    assert seen is not None and 0.7 < seen.worst_group_agreement < 0.9
    ours = source("denoised", train, val)
    for split in (train, val):
        assert torch.equal(ours.of(split), split.attribute)
    assert torch.equal(source("denoised", train, val, FOLDS=3).of(train), train.attribute)


def test_one_value_in_all_images_is_refused() -> None:
    train, val = planted("train", 20, 8), planted("val", 10, 9)
    ours = source("denoised", train, val)
    ours.seen.of = lambda split: torch.zeros_like(split.label)
    with pytest.raises(UserError, match="sees one value in all training images"):
        ours.of(train)
    ours.seen.of = lambda split: (torch.arange(len(split.label)) == 3).long()
    assert ours.of(train).sum() <= 1  # predictors that know one value only


def test_labels_of_training_images_stay() -> None:
    train, val = planted("train", 60, 8), planted("val", 20, 9)
    odd = Split("train", train.label, torch.where(torch.arange(60) % 2 == 0, train.attribute, -1), train.features)
    ours = source("ssa", odd, val, SPLIT="train")
    assert torch.equal(ours.of(odd), train.attribute)
    with pytest.raises(
        UserError, match=r"of the train split, 1 have an attribute label.*with 1 value; it needs two: raise"
    ):
        source("ssa", odd, val, SPLIT="train", SHARE=0.01).num_values(odd)


# --- a column of a csv file --------------------------------------------------------------------------------------


def a_table(folder: Path, *rows: str, header: str = "path,place") -> dict[str, str]:
    file = folder / "places.csv"
    file.write_text("\n".join([header, *rows]) + "\n")
    return {"FILE": str(file), "COLUMN": "place"}


def rows_of(*splits: Split) -> list[str]:
    return [f"{s.name}/{i}.png,{'sea' if a else 'land'}" for s in splits for i, a in enumerate(s.attribute.tolist())]


def test_a_column_gives_the_values_by_the_end_of_the_path(tmp_path: Path) -> None:
    train, val = planted("train", 12, 0), planted("val", 6, 1)
    rows = rows_of(train, val)
    rows[-1] = rows[-1].split(",")[0] + ","
    ours = source("csv", train, val, **a_table(tmp_path, *reversed(rows)))
    assert ours.names == ("land", "sea") and ours.num_values(train) == 2
    assert torch.equal(ours.of(train), train.attribute)
    assert ours.of(val).tolist() == [*val.attribute[:-1].tolist(), -1]


def test_a_row_of_images_of_two_splits_is_refused(tmp_path: Path) -> None:
    train, val = planted("train", 12, 0), planted("val", 6, 1)
    ours = source("csv", train, val, **a_table(tmp_path, *(row.removeprefix("train/") for row in rows_of(train))))
    ours.of(train)
    with pytest.raises(UserError, match=r"the row of 0\.png could be that of .*train/0\.png and of .*val/0\.png"):
        ours.of(val)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"COLUMN": "plce"}, r"CSV\.COLUMN: .*places\.csv has no column plce: did you mean 'place'"),
        ({"COLUMN": ""}, r"TRAINER\.GROUPS csv needs TRAINER\.GROUP_SOURCES\.CSV\.COLUMN"),
        ({"IMAGE": "file"}, r"CSV\.IMAGE: .*has no column file"),
        ({"FILE": "nowhere.csv"}, r"cannot read nowhere\.csv"),
        (3, r"gives no value in the column place to 3 of 12 images of the train split, such as /data/set/train/9\.png"),
        ("train/0.png,sea", r"line 14: train/0\.png has a row already"),
        ("./train/0.png,sea", r"line 14: train/0\.png has a row already"),
        ("same", r"the row of 0\.png could be that of /data/other/0\.png and of /data/set/train/0\.png"),
        ("one", r"has 1 value in the column place; groups need two"),
    ],
)
def test_a_column_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    train, val = planted("train", 12, 0), planted("val", 6, 1)
    rows, keys = rows_of(train), {}
    if isinstance(change, dict):
        keys = change
    elif isinstance(change, int):
        rows = rows[:-change]
    elif change == "same":
        rows = [row.removeprefix("train/") for row in rows]
        twin = [f"/data/{'set/train' if i else 'other'}/{max(i - 1, 0)}.png" for i in range(12)]
        train = Split("train", train.label, train.attribute, train.features, lambda: twin)
    elif change == "one":
        rows = [f"{row.split(',')[0]},sea" for row in rows]
    else:
        rows.append(change)
    with pytest.raises(UserError, match=message) as error:
        source("csv", train, val, **a_table(tmp_path, *rows) | keys).num_values(train)
    assert "\n" not in str(error.value)


# --- quality ------------------------------------------------------------------------------------------------------


def test_quality_matches_values_class_by_class() -> None:
    label = torch.tensor([0] * 6 + [1] * 4)
    attribute = torch.tensor([0, 0, 0, 0, 1, 1, 0, 1, 1, -1])
    value = torch.tensor([2, 2, 2, 0, 0, 0, 1, 0, 0, 0])  # class 0: 2 is 0 and 0 is 1; class 1: 1 is 0 and 0 is 1
    quality = group_quality(value, label, attribute)
    assert quality.agreement == pytest.approx(8 / 9) and quality.num_samples == 9 and quality.num_groups == 4
    assert quality.groups == ((0, 0, 4, 0.75), (0, 1, 2, 1.0), (1, 0, 1, 1.0), (1, 1, 2, 1.0))
    assert quality.worst_group_agreement == 0.75 and 0 < quality.adjusted_mutual_information < 1
    alike = group_quality(torch.zeros(10, dtype=torch.long), label, attribute)
    assert alike.worst_group_agreement == 0 and alike.adjusted_mutual_information == pytest.approx(0)
    assert group_quality(value, label, torch.full_like(label, -1)) is None


def test_quality_is_in_the_results_and_outlives_a_second_call(run: Run, tmp_path: Path) -> None:
    keys = [*SHORT, "TRAINER.GROUPS", "errors"]
    first = run("DebiasedPT", "one", *keys)
    row = first["group_quality"]["train"]
    assert row["source"] == "errors" and row["num_samples"] == 40 and 0 < row["agreement"] <= 1
    assert json.loads((tmp_path / "one" / "group_quality.json").read_text()) == first["group_quality"]
    assert "## Groups that training used" in (tmp_path / "one" / "results.md").read_text()
    assert "Groups by errors (train): " in (tmp_path / "one" / "log.txt").read_text()
    assert run("DebiasedPT", "one", *keys)["group_quality"] == first["group_quality"]
    assert "group_quality" not in run("DebiasedPT", "true", *SHORT, "TRAINER.GROUPS", "true")


# --- runs ---------------------------------------------------------------------------------------------------------


def _csv_keys(build: Build, tmp_path: Path) -> list[Any]:
    """A csv file of the true attributes of the images of a run."""
    data = build("CoOp", *SHORT).attributes.data
    rows = [f"{p},{a}" for s in (data.train, data.val) for p, a in zip(s.paths(), s.attribute.tolist(), strict=True)]
    keys = a_table(tmp_path, *rows)
    return [x for key, value in keys.items() for x in (f"TRAINER.GROUP_SOURCES.CSV.{key}", value)]


@pytest.mark.parametrize("name", ["true", "pseudo", "audit", "csv", "denoised", *COMPUTED])
def test_every_debiaser_takes_every_source(name: str, build: Build, tmp_path: Path) -> None:
    keys = _csv_keys(build, tmp_path) if name == "csv" else []
    trainer = build("GroupDRO", *SHORT, "TRAINER.GROUPS", name, "TRAINER.COOPOOD.ANCHOR", "groups", *keys)
    split, learner = trainer.context.data.train, trainer.learner
    alignment = learner(split.features())
    for one in (GroupDRO, DebiasedPT, RWG, SUBG, GroupCoOp, DFR, CoOpOOD):
        debiaser = one.debiaser_class(trainer.cfg, trainer.context)
        debiaser.check()
        debiaser.before_train()
        debiaser.before_epoch(0)
        logits = debiaser.predict(alignment)
        step = Step(alignment, logits, split.label, split.attribute, torch.arange(len(split.label)))
        made = debiaser.contribute(step)
        parts = [part for part in (made.per_sample_loss, made.sample_weights, made.penalty) if part is not None]
        assert logits.isfinite().all() and all(part.isfinite().all() for part in parts)
    assert trainer.attributes.groups_by == name and (name in ("true", "pseudo", "audit", "csv")) == (
        not (trainer.output_dir / FILE).exists()
    )


@pytest.mark.parametrize("name", ["errors", "clusters"])
def test_a_resumed_run_has_the_groups_of_the_unbroken_one(
    name: str, arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = ["TRAINER.GROUPS", name, "DATASET.SHAPES.NUM_VAL", 16, *SHORT[6:]]
    assert_resumes(arguments, tmp_path, monkeypatch, "GroupDRO", *keys)
    one, other = (dict(np.load(tmp_path / folder / FILE)) for folder in ("unbroken", "broken"))
    assert one.keys() == other.keys() and all((one[key] == other[key]).all() for key in one)
    assert "Groups of the train split: those of" in (tmp_path / "broken" / "log.txt").read_text()


def test_kept_groups_of_other_images_or_damaged_ones_are_refused(tmp_path: Path) -> None:
    cfg = get_cfg_default()
    set_key(cfg, "OUTPUT_DIR", str(tmp_path), "test")
    train, val = planted("train", 20, 0), planted("val", 10, 1)
    made = SimpleNamespace(names=("x", "y"), may_be_fewer=False, of=lambda split: split.attribute)

    def kept(data: LabelledData, epoch: int) -> KeptGroups:
        return KeptGroups(made, data, cfg, RunState(start_epoch=epoch), True)

    data = LabelledData(train, val, ["a", "b"], [], 2)
    kept(data, 0).of(train)
    made.of = lambda split: pytest.fail("computed again")
    assert torch.equal(kept(data, 1).of(val), val.attribute)
    with pytest.raises(UserError, match=r"groups\.npz is of other train images; delete it"):
        kept(
            LabelledData(
                Split("train", 1 - train.label, train.attribute, train.features, train.paths), val, ["a", "b"], [], 2
            ),
            1,
        ).of(train)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:100])
    with pytest.raises(UserError, match=r"groups\.npz is damaged .*delete it"):
        kept(data, 1).of(train)


@pytest.mark.parametrize(
    ("trainer", "keys", "trainings"),
    [
        ("JTT", ["TRAINER.STACK", "['DebiasedPT']", "TRAINER.JTT.FIRST_EPOCHS", 1], 1),
        ("DFR", [], 0),
        ("DFR", ["TRAINER.STACK", "['JTT']", "TRAINER.JTT.FIRST_EPOCHS", 1], 1),
    ],
)
def test_no_first_model_is_trained_twice(
    trainer: str, keys: list[Any], trainings: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, trained = FirstStage._fit, []

    def counted(self: FirstStage, epochs: int, choose: Tensor | None) -> Any:
        trained.append(epochs)
        return fit(self, epochs, choose)

    monkeypatch.setattr(FirstStage, "_fit", counted)
    results = run(trainer, "out", *TINY, "OPTIM.MAX_EPOCH", 1, "TRAINER.GROUPS", "errors", *keys)
    assert trained == [1] * trainings and results["groups_by"] == "errors" and results["group_quality"]


def test_the_audit_names_what_the_data_set_names_otherwise(build: Build, run: Run) -> None:
    keys = ["DATASET.ATTRIBUTE_NAMES", "('red','blue')", "DATASET.SHAPES.CORRELATION", 0.95]
    keys += ["DATASET.SHAPES.NUM_TRAIN", 240, "OPTIM.MAX_EPOCH", 1, "TRAINER.GROUPS", "audit"]
    results = run("RWG", "audit", *keys)
    names = results["proposed_attribute_names"]
    assert not {"red", "blue"} & {*names} and results["group_quality"]["train"]["worst_group_agreement"] > 0.9
    assert build("RWG", *keys).attributes.pseudo.names == ("red", "blue")


def test_groups_without_images_take_no_part_in_group_coop(build: Build) -> None:
    trainer = build("GroupCoOp", *SHORT, "TRAINER.GROUPS", "clusters", "TRAINER.GROUP_SOURCES.CLUSTERS.K_MAX", 12)
    debiaser = trainer.debiasers[0]
    z = trainer.context.data.train.features()
    with torch.no_grad():
        debiaser.before_train()
        alignment = trainer.learner(z)
        count = trainer.attributes.groups(trainer.context.data.train).count
        assert (count == 0).sum() > 0 and torch.equal(debiaser.present, count > 0)
        assert (debiaser.group_logits(alignment).softmax(dim=-1).flatten(1)[:, count == 0] == 0).all()
        head = debiaser.head(Head(alignment.logit_scale, alignment.text_features))
        torch.testing.assert_close(head.logits(z), debiaser.predict(alignment), rtol=1e-4, atol=1e-4)


def test_an_anchor_on_groups_is_that_on_the_same_attribute(build: Build) -> None:
    made = {}
    for anchor in ("attributes", "groups"):
        trainer: PromptTrainer = build("CoOpOOD", *SHORT, "TRAINER.COOPOOD.ANCHOR", anchor)
        made[anchor] = trainer.debiasers[0]
        made[anchor].before_train()
    assert torch.equal(made["groups"].pseudo_attribute, made["attributes"].pseudo_attribute)
    assert made["groups"].attribute_text.shape == made["attributes"].attribute_text.shape
