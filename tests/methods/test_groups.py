"""Groups and pseudo-attributes: what they are made of, their noise, and the report on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from oodprompt.backbones import load_backbone, tokenize
from oodprompt.config.registry import GROUP_SOURCE_REGISTRY
from oodprompt.engine.evaluation import attribute_metrics
from oodprompt.engine.loop import RunState
from oodprompt.engine.selection import Selection
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.features.encoder import Encoder
from oodprompt.methods.attributes import DiscoveredAttributes, DiscoveredClusters, PseudoAttributes
from oodprompt.methods.contracts import GroupSource
from oodprompt.methods.groups import AttributeSources, Groups, per_group
from oodprompt.methods.splits import LabelledData, Split
from oodprompt.reports.attributes import _lines
from oodprompt.reports.curves import group_curves
from tests.helpers.runs import interrupted_at

PROMPTS = [["a photo of water.", "the sea"], ["a photo of land."], ["a photo of snow."]]
NAMES = ("water", "land", "snow")


NOTHING = DiscoveredAttributes(lambda: DiscoveredClusters((), {}, {}))  # raises when it is asked


def a_split(n: int = 50, name: str = "train") -> Split:
    torch.manual_seed(0)
    z = F.normalize(torch.randn(n, load_backbone("tiny").shape.embed_dim), dim=1)
    return Split(name, torch.arange(n) % 2, torch.arange(n) % 3, lambda: z)


def pseudo(noise: float = 0.0) -> PseudoAttributes:
    return PseudoAttributes(
        load_backbone("tiny"), NAMES, PROMPTS, noise, lambda split: np.random.default_rng(len(split))
    )


def test_posterior_is_the_formula() -> None:
    clip, split, ours = load_backbone("tiny"), a_split(), pseudo()
    rows = []
    with torch.no_grad():
        for prompts in PROMPTS:
            each = [F.normalize(clip.encode_text(tokenize([p]))[0], dim=0) for p in prompts]
            rows.append(F.normalize(sum(each) / len(each), dim=0))
        expected = (clip.logit_scale.exp() * split.features() @ torch.stack(rows).T).softmax(1)
    torch.testing.assert_close(ours.posterior(split), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.of(split), expected.argmax(1)) and ours.splits == ("train",)


def test_noise_moves_that_share_and_keeps_the_values() -> None:
    split, clean = a_split(), pseudo()
    noisy = pseudo(0.3)
    moved = noisy.of(split) != clean.of(split)
    assert moved.sum() == 15
    torch.testing.assert_close(noisy.posterior(split).sort(1)[0], clean.posterior(split).sort(1)[0])
    assert torch.equal(noisy.posterior(split)[~moved], clean.posterior(split)[~moved])
    assert torch.equal(pseudo(0.3).of(split), noisy.of(split))
    val = a_split(name="val")
    assert not torch.equal(pseudo(0.3).of(val), noisy.of(split))  # another draw for another split
    offsets = (noisy.of(split) - clean.of(split))[moved] % 3
    assert set(offsets.tolist()) == {1, 2}


def groups_of(split: Split, choice: str, values: int, seen: PseudoAttributes, found: DiscoveredAttributes) -> Groups:
    """The groups of a split of two classes."""
    data = LabelledData(split, None, ["a", "b"], seen.names, values)
    attributes = AttributeSources(
        choice, data, seen, found, lambda: GROUP_SOURCE_REGISTRY.get(choice, "TRAINER.GROUPS")({}, context)
    )
    context = SimpleNamespace(data=data, attributes=attributes)
    return attributes.groups(split)


def test_groups_of_both_kinds() -> None:
    split, seen = a_split(), pseudo()
    true = groups_of(split, "true", 3, seen, NOTHING)
    assert torch.equal(true.index, split.label * 3 + split.attribute)
    assert true.names == ("a / water", "a / land", "a / snow", "b / water", "b / land", "b / snow")
    assert true.count.tolist() == [sum((true.index == g).tolist()) for g in range(6)]
    assert not seen.splits  # labels are enough, nothing is encoded
    guessed = groups_of(split, "pseudo", 3, seen, NOTHING)
    assert torch.equal(guessed.index, split.label * 3 + seen.of(split)) and guessed.count.sum() == 50
    found = DiscoveredClusters((2,), {"train": torch.arange(60) % 7}, {"train": torch.arange(60) % 50})
    regions = groups_of(split, "regions", 3, seen, DiscoveredAttributes(lambda: found))
    present = {i % 50 for i in range(60) if i % 7 == 2}
    assert regions.names == ("a / absent", "a / present", "b / absent", "b / present")
    assert regions.index.tolist() == [2 * (i % 2) + (i in present) for i in range(50)]
    nameless = groups_of(split, "true", 4, PseudoAttributes(load_backbone("tiny"), (), []), NOTHING)
    assert nameless.names[:4] == ("a / 0", "a / 1", "a / 2", "a / 3")  # a value that only another split has counts too
    assert torch.equal(nameless.index, split.label * 4 + split.attribute)


def test_unknown_attributes_are_refused() -> None:
    split = a_split()
    split.attribute[3:5] = -1
    with pytest.raises(UserError, match=r"2 of 50 images of the train split have no\s+attribute label.*pseudo"):
        groups_of(split, "true", 3, pseudo(), NOTHING)
    split = a_split(name="val")
    split.attribute[:] = -1
    with pytest.raises(UserError, match="50 of 50 images of the val split have no attribute label; use TRAINER.GROUPS"):
        groups_of(split, "true", 3, pseudo(), NOTHING)


def test_validation_images_without_an_attribute_are_in_no_group() -> None:
    split = a_split(name="val")
    split.attribute[3:5] = -1
    groups = groups_of(split, "true", 3, pseudo(), NOTHING)
    assert groups.index.tolist() == [-1 if i in (3, 4) else 3 * (i % 2) + i % 3 for i in range(50)]
    assert groups.known.sum() == 48 and groups.count.sum() == 48 and len(groups.count) == 6


def test_groups_of_classes_of_one_name_have_names_of_their_own() -> None:
    data = LabelledData(a_split(), None, ["crane", "crane"], NAMES, 3)
    source = SimpleNamespace(names=NAMES, num_values=lambda split: 3, of=lambda split: split.attribute)
    names = AttributeSources("true", data, pseudo(), NOTHING, lambda: source).groups(data.train).names
    assert names[0] == "crane (class 0) / water" and names[-1] == "crane (class 1) / snow"


def test_sums_by_group() -> None:
    total, count = per_group(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 0, 2]), 4)
    assert total.tolist() == [2, 0, 5, 0] and count.tolist() == [1, 0, 2, 0] and total.dtype == torch.float64


def test_agreement_with_labels() -> None:
    data = SimpleNamespace(
        attribute_prompts=PROMPTS[:2], attribute_names=NAMES[:2], classnames=["a", "b"], num_classes=2
    )
    label = torch.tensor([0, 0, 0, 1, 1, 1])
    attribute = torch.tensor([0, 0, 1, 1, 1, 1])
    seen = torch.tensor([0, 1, 1, 1, 1, 0])
    row = attribute_metrics(seen, label, attribute, data)
    assert row["accuracy"] == pytest.approx(4 / 6)
    shown = [(g["class"], g["attribute"], g["num_samples"], g["accuracy"]) for g in row["groups"]]
    assert shown == [("a", "water", 2, 0.5), ("a", "land", 1, 1.0), ("b", "land", 3, pytest.approx(2 / 3))]
    assert row["counts"] == [[1, 2], [1, 2]]
    assert row["confusion"] == [[0.5, 0.5], [0.25, 0.75]]
    partly = attribute_metrics(seen, label, torch.tensor([0, 0, -1, -1, 1, 1]), data)
    assert partly["accuracy"] == 2 / 4
    assert _lines("val", partly)[0].endswith(
        "(val): 50.0% agree with the attribute labels of the 4 images, of 6, that have one"
    )
    assert _lines("val", row)[0].endswith("66.7% agree with the attribute labels")
    unknown = attribute_metrics(seen, label, torch.full((6,), -1), data)
    assert unknown["accuracy"] is None and not unknown["groups"] and unknown["counts"] == [[1, 2], [1, 2]]


@pytest.mark.pictures
def test_report_lies_with_the_run(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = run("DebiasedPT", "one", "OPTIM.MAX_EPOCH", 1, "TRAINER.PSEUDO_NOISE", 0.2)
    report = json.loads((tmp_path / "one" / "pseudo_attributes.json").read_text())
    assert report["attributes"] == ["water", "land"] and report["noise"] == 0.2 and len(report["prompts"]) == 2
    row = report["splits"]["train"]
    assert row["accuracy"] == results["pseudo_attribute_accuracy"]["train"] == pytest.approx(0.8, abs=0.02)
    assert sum(g["num_samples"] for g in row["groups"]) == sum(map(sum, row["counts"])) == 80
    assert (tmp_path / "one" / "pseudo_attributes.png").stat().st_size > 3000
    assert "Pseudo-attributes (train): 80.0% agree" in (tmp_path / "one" / "log.txt").read_text()
    run("CoOp", "none", "OPTIM.MAX_EPOCH", 1)
    assert not (tmp_path / "none" / "pseudo_attributes.json").exists()


@pytest.mark.parametrize(("unknown", "refused"), [(slice(0, 3), False), (slice(None), True)])
def test_the_worst_group_is_chosen_by_where_an_attribute_is_known(unknown: slice, refused: bool) -> None:
    test = SimpleNamespace(SELECTION="worst_group_accuracy", FINAL_MODEL="best_val")
    cfg = SimpleNamespace(TEST=test, TRAIN=SimpleNamespace(VAL_FREQ=0))
    val = a_split(name="val")
    val.attribute[unknown] = -1
    with pytest.raises(UserError, match="no validation image has an attribute") if refused else nullcontext():
        Selection(cfg, RunState(max_epoch=1)).check(val, pseudo())


# --- which epoch is tested -------------------------------------------------------------------------------------

BEST = ["TEST.FINAL_MODEL", "best_val"]


def follow(monkeypatch: pytest.MonkeyPatch, values: list[dict[str, float | None]]) -> None:
    """Validation gives ``values`` epoch by epoch; everything else is evaluated as usual."""
    evaluate, rows = PromptTrainer.evaluate, iter(values)

    def told(self: PromptTrainer, split: str) -> dict[str, Any]:
        metrics = evaluate(self, split)
        return {**metrics, **next(rows)} if split == "val" else metrics

    monkeypatch.setattr(PromptTrainer, "evaluate", told)


def told(accuracy: float, worst: float | None, pseudo: float | None) -> dict[str, float | None]:
    return {"accuracy": accuracy, "worst_group_accuracy": worst, "worst_pseudo_group_accuracy": pseudo}


VALUES = [told(0.9, 0.1, 0.2), told(0.8, 0.7, 0.5), told(0.7, 0.6, 0.6)]


@pytest.mark.parametrize(
    ("selection", "epoch"),
    [("auto", 2), ("accuracy", 1), ("worst_group_accuracy", 2), ("worst_pseudo_group_accuracy", 3)],
)
def test_every_criterion_chooses_its_epoch(
    selection: str, epoch: int, run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    follow(monkeypatch, VALUES)
    results = run("DebiasedPT", "best", *BEST, "TEST.SELECTION", selection, "OPTIM.LR", 0.05, "OPTIM.WARMUP_EPOCH", -1)
    assert results["best_epoch"] == epoch
    chosen = {s["criterion"]: (s["epoch"], s["validation"]) for s in results["selections"]}
    assert chosen == {
        "accuracy": (1, 0.9),
        "worst_group_accuracy": (2, 0.7),
        "worst_pseudo_group_accuracy": (3, 0.6),
        "last epoch": (3, None),
    }
    by_epoch = {s["epoch"]: s["accuracy"] for s in results["selections"]}
    assert results["accuracy"] == by_epoch[epoch]
    files = {p.name for p in (tmp_path / "best" / "prompt_learner").glob("model-best*")}
    assert len(files) == 3 and "model-best.pth.tar" in files
    state = torch.load(tmp_path / "best" / "prompt_learner" / "model-best.pth.tar", weights_only=True)
    assert state["epoch"] == epoch
    assert "epoch chosen by" in (tmp_path / "best" / "results.md").read_text()


def test_of_equal_epochs_the_first_counts(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    follow(monkeypatch, [told(0.9, 0.5, 0.5)] * 3)
    assert run("CoOp", "ties", *BEST)["best_epoch"] == 1


def test_pseudo_groups_of_validation_are_not_the_labels(build: Callable[..., PromptTrainer]) -> None:
    trainer = build("CoOp", *BEST, "TRAINER.PSEUDO_NOISE", 0.5, "DATASET.SHAPES.NUM_VAL", 64)
    metrics = trainer.evaluate("val")
    val = trainer.encoder.split("val")
    group = 2 * val.label + trainer.attributes.pseudo.of(val)
    right = trainer.learner(val.features()).logits.argmax(1) == val.label
    worst = min(right[group == g].double().mean().item() for g in range(4))
    assert metrics["worst_pseudo_group_accuracy"] == pytest.approx(worst) != metrics["worst_group_accuracy"]


def test_selected_models_are_what_they_were(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracies of the comparison are those of runs that choose by that criterion."""
    keys = [*BEST, "OPTIM.LR", 0.05, "OPTIM.WARMUP_EPOCH", -1]
    follow(monkeypatch, 3 * VALUES)
    results = run("DebiasedPT", "auto", *keys)
    for criterion in ("accuracy", "worst_pseudo_group_accuracy"):
        other = run("DebiasedPT", criterion, *keys, "TEST.SELECTION", criterion)
        row = next(s for s in results["selections"] if s["criterion"] == criterion)
        assert row["accuracy"] == other["accuracy"] and row["gap"] == other["gap"]


def test_no_attribute_labels_in_validation(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = [told(0.9, None, 0.2), told(0.8, None, 0.5), told(0.7, None, 0.6)]
    with monkeypatch.context() as patch:
        follow(patch, without)
        results = run("DebiasedPT", "auto", *BEST)
    assert results["best_epoch"] == 1 and "worst_group_accuracy" not in [s["criterion"] for s in results["selections"]]
    follow(monkeypatch, without)
    monkeypatch.setattr(Encoder, "split", without_labels(Encoder.split))
    with pytest.raises(UserError, match=r"worst_group_accuracy: no validation image has an attribute label"):
        run("DebiasedPT", "true", *BEST, "TEST.SELECTION", "worst_group_accuracy")
    assert not (tmp_path / "true" / "tensorboard").exists()


def without_labels(split: Callable[..., Split]) -> Callable[..., Split]:
    def blind(self: Encoder, name: str) -> Split:
        s = split(self, name)
        return Split(s.name, s.label, torch.full_like(s.attribute, -1), s.features)

    return blind


def test_report_covers_validation_and_outlives_a_second_call(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    keys = ["OPTIM.MAX_EPOCH", 1, "TRAINER.DEBIASEDPT.MEASURE", "held_out"]
    first = run("DebiasedPT", "twice", *keys)
    assert set(first["pseudo_attribute_accuracy"]) == {"train", "val"}
    log = (tmp_path / "twice" / "log.txt").read_text()
    assert log.count("Pseudo-attributes (train)") == log.count("Pseudo-attributes (val)") == 1
    assert run("DebiasedPT", "twice", *keys)["pseudo_attribute_accuracy"] == first["pseudo_attribute_accuracy"]


def test_what_takes_no_groups_says_none(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    keys = ["OPTIM.MAX_EPOCH", 1, "TRAINER.JTT.FIRST_EPOCHS", 1]
    assert run("JTT", "jtt", *keys)["groups_by"] is None
    assert run("RWG", "rwg", *keys)["groups_by"] == "pseudo"
    run("DebiasedPT", "nothing", "--base", "ZeroshotCLIP")
    assert "so DebiasedPT changes nothing" in (tmp_path / "nothing" / "log.txt").read_text()


def test_the_size_of_groups_counts_once(build: Callable[..., PromptTrainer]) -> None:
    unbalanced = ["TRAINER.GROUPDRO.BALANCED", False]
    for one, other, *keys in (
        *((name, "DebiasedPT") for name in ("RWG", "SUBG", "GroupDRO", "GroupCoOp")),
        ("GroupCoOp", "RWG"),
        ("GroupDRO", "DebiasedPT", *unbalanced),
    ):
        with pytest.raises(UserError, match=rf"{one} and {other} each make up for the sizes of groups"):
            build(one, "TRAINER.STACK", f"['{other}']", *keys)
    for other in ("RWG", "GroupDRO", "DebiasedPT"):
        build("GroupCoOp", "TRAINER.STACK", f"['{other}']", "TRAINER.GROUPCOOP.BALANCE", False)
    build("AFR", "TRAINER.STACK", "['DebiasedPT']")
    build("SUBG", "TRAINER.STACK", "['GroupDRO']", *unbalanced)  # its weights go by the batch


def test_resumed_run_selects_as_the_unbroken_one(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        follow(patch, VALUES)
        whole = run("DebiasedPT", "whole", *BEST)
    with monkeypatch.context() as patch:
        follow(patch, VALUES)
        patch.setattr(PromptTrainer, "forward_backward", interrupted_at(2, 0))
        with pytest.raises(KeyboardInterrupt):
            run("DebiasedPT", "broken", *BEST)
    with monkeypatch.context() as patch:
        follow(patch, VALUES[2:])
        elsewhere = run("DebiasedPT", "moved", *BEST, "--resume", str(tmp_path / "broken"))
    assert elsewhere["selections"] == whole["selections"]


def test_pictures_by_group() -> None:
    rows = [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "by_group": {"share": {"a": 0.2, "b": 0.8}, "acc": {"a": 1.0}}}]
    figure = group_curves(rows)
    assert [axes.get_title() for axes in figure.axes] == ["share", "acc"]
    assert [line.get_label() for line in figure.axes[0].get_lines()] == ["a", "b"]
    assert figure.axes[0].get_lines()[1].get_ydata() == [0.8]
    assert group_curves(rows[:1]) is None
    many = {"epoch": 1, "by_group": {"share": {f"g{i}": i for i in range(30)}}}
    assert [line.get_label() for line in group_curves([many]).axes[0].get_lines()][0] == "g29"
    assert len(group_curves([many]).axes[0].get_lines()) == 12


def test_a_source_of_groups_of_ones_own(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Parity(GroupSource):
        names = ("even", "odd")

        def of(self, split: Split) -> torch.Tensor:
            return torch.arange(len(split.label)) % 2

    monkeypatch.setattr(GROUP_SOURCE_REGISTRY, "_objects", dict(GROUP_SOURCE_REGISTRY._objects))
    GROUP_SOURCE_REGISTRY.register(Parity, name="parity")
    results = run("GroupDRO", "own", "OPTIM.MAX_EPOCH", 1, "TRAINER.GROUPS", "parity")
    assert results["groups_by"] == "parity"


def test_an_unknown_source_is_refused_before_anything_is_read(
    build: Callable[..., PromptTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("oodprompt.engine.trainer.DataManager", lambda *_: pytest.fail("the data set is read"))
    with pytest.raises(UserError, match="TRAINER.GROUPS: unknown source of groups 'treu': did you mean 'true'"):
        build("CoOp", "TRAINER.GROUPS", "treu")
