"""RaVL's stage 2: L_R and L_A against the plain formula, over prompts and over the image tower; discovery inside a run."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oodprompt.trainers.finetune import contrastive_loss
from oodprompt.trainers.ravl import region_losses
from torch import Tensor

from oodprompt import cli, discovering
from oodprompt.backbones import tokenize
from oodprompt.engine.trainer import PromptTrainer
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Step
from oodprompt.reports.discovery import read_discovery
from tests.helpers.resampling import assert_resumes
from tests.helpers.runs import command_line, no_pictures

Arguments = Callable[..., list[str]]
Build = Callable[..., PromptTrainer]
TOWER = ["TRAINER.RAVL.TUNE", "image_encoder", "OPTIM.NAME", "adamw", "OPTIM.LR", 1e-3]


def plain_losses(s: Tensor, image: Tensor, spurious: Tensor, label: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The formulas as they are written, image by image; nan where an image has no region that is not spurious."""
    B, labels = len(label), sorted(set(label.tolist()))
    core = [[r for r in range(len(s)) if image[r] == i and not spurious[r]] for i in range(B)]
    wrong = [r for r in range(len(s)) if spurious[r]]

    def sigma_m(i: int, c: int) -> Tensor:
        return torch.stack([s[r, c] for r in core[i]]).max().exp()

    P = sum((torch.stack([s[r, c] for c in labels]).max().exp() for r in wrong), torch.zeros(()))
    L_R, L_A = [], []
    for i in range(B):
        y = int(label[i])
        if not core[i]:
            L_R.append(s.new_tensor(math.nan))
            L_A.append(s.new_tensor(math.nan))
            continue
        own = sigma_m(i, y)
        L_R.append(-(own / (sum(sigma_m(i, c) for c in labels) + P)).log())
        others = sum((sigma_m(j, y) for j in range(B) if label[j] != y and core[j]), torch.zeros(()))
        L_A.append(-(own / (own + others + sum((s[r, y].exp() for r in wrong), torch.zeros(())))).log())
    return L_R, L_A


@pytest.mark.parametrize("share", [0.0, 0.3, 0.8, 1.0])
def test_losses_are_the_plain_formula_with_its_gradient(share: float) -> None:
    g = torch.Generator().manual_seed(round(100 * share))
    image = torch.arange(9).repeat_interleave(torch.tensor([3, 1, 4, 0, 2, 3, 1, 2, 4]))
    s = torch.randn(len(image), 5, generator=g, dtype=torch.double).mul(3).requires_grad_()
    spurious = torch.rand(len(image), generator=g) < share
    label = torch.tensor([0, 3, 3, 1, 0, 4, 0, 3, 4])  # class 2 is not in the batch
    L_R, L_A, has = region_losses(s, image, spurious, label)
    want_R, want_A = (torch.stack(x) for x in plain_losses(s, image, spurious, label))
    assert has.tolist() == (~want_R.isnan()).tolist()
    assert torch.allclose(L_R[has], want_R[has]) and torch.allclose(L_A[has], want_A[has])
    assert not L_R[~has].any() and not L_A[~has].any()
    if has.any():
        for got, want in ((L_R, want_R), (L_A, want_A)):
            (a,) = torch.autograd.grad(got.sum(), s, retain_graph=True)
            (b,) = torch.autograd.grad(want[has].sum(), s, retain_graph=True)
            assert torch.allclose(a, b), (a - b).abs().max()


def test_one_label_and_nothing_spurious_leave_nothing_to_separate() -> None:
    s = torch.randn(6, 4)
    L_R, L_A, has = region_losses(s, torch.arange(6) // 2, torch.zeros(6, dtype=torch.bool), torch.zeros(3).long())
    assert has.all() and torch.allclose(L_R, torch.zeros(3)) and torch.allclose(L_A, torch.zeros(3))


def test_finite_at_the_ends_of_the_cosine() -> None:
    s = (torch.randint(0, 2, (40, 3)).float() * 2 - 1).div(0.07).requires_grad_()
    L_R, L_A, _ = region_losses(s, torch.arange(40) // 4, torch.arange(40) % 3 == 0, torch.arange(10) % 3)
    (L_R + L_A).sum().backward()
    assert torch.isfinite(L_R).all() and torch.isfinite(L_A).all() and torch.isfinite(s.grad).all()


def test_no_region_is_spurious_or_all_are() -> None:
    s = torch.randn(8, 2, requires_grad=True)
    for mark in (False, True):
        L_R, L_A, has = region_losses(s, torch.arange(8) // 2, torch.full((8,), mark), torch.tensor([0, 1, 0, 1]))
        assert has.all() == (not mark) and torch.isfinite(L_R + L_A).all()
        (gradient,) = torch.autograd.grad((L_R + L_A).sum(), s)
        assert torch.isfinite(gradient).all()


def test_contrastive_loss_is_clips() -> None:
    z, t = F.normalize(torch.randn(5, 7), dim=-1), F.normalize(torch.randn(5, 7), dim=-1)
    p = torch.stack([(z[i] @ t.T / 0.07).softmax(0)[i] for i in range(5)])
    q = torch.stack([(t[i] @ z.T / 0.07).softmax(0)[i] for i in range(5)])
    want = -(p.log().mean() + q.log().mean()) / 2
    assert torch.allclose(contrastive_loss(z, t, torch.tensor(1 / 0.07)), want, atol=1e-5)


ANYTHING = ("DISCOVERY.THRESHOLD", "-1", "DISCOVERY.BOTH_SIGNS", "False")  # every filter is off: something is found


@pytest.fixture(scope="module")
def found(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of CoOp in which discovery found something; nobody writes there."""
    folder = tmp_path_factory.mktemp("found") / "base"
    with no_pictures():
        cli.run(command_line(data_root, folder, "CoOp", "OPTIM.LR", 0.05))
        script("--model-dir", folder, *ANYTHING)
    return folder


def script(*words: Any) -> None:
    discovering.run(list(map(str, words)))


def prepared(build: Build, trainer: str, *keys: Any) -> PromptTrainer:
    """A trainer as it stands ahead of its first step."""
    made = build(trainer, *ANYTHING, "DISCOVERY.EPOCHS", 1, *keys)
    made.before_train()
    made.before_epoch()
    made.batch_idx, made.num_batches = 0, 9
    return made


def test_run_with_a_discovery_of_its_own(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    results = run("RaVL", "own", *ANYTHING, "DISCOVERY.EPOCHS", 2)
    assert results["trainer"] == "RaVL" and results["base"] == "CoOp"
    content = read_discovery(tmp_path / "own")
    assert content["num_images"] == 16 and content["num_regions"] == 64
    assert 4 <= content["clustering"]["k"] <= 9
    for name in ("discovery.html", "discovery.png", "discovery.md", "discovery.npz"):
        assert (tmp_path / "own" / name).is_file()
    assert "is trained alone first, for 2 epochs" in (tmp_path / "own" / "log.txt").read_text()


def test_the_model_of_discovery_is_the_base_trained_alone(found: Path, arguments: Arguments, tmp_path: Path) -> None:
    cli.run(arguments("RaVL", "own", "OPTIM.LR", 0.05, *ANYTHING))
    one, two = (np.load(folder / "discovery.npz") for folder in (found, tmp_path / "own"))
    assert sorted(one.files) == sorted(two.files)
    assert all(np.array_equal(one[name], two[name]) for name in one.files)
    clusters = [read_discovery(folder)["clusters"] for folder in (found, tmp_path / "own")]
    assert clusters[0] == clusters[1]


def test_step_is_the_formula_over_prompts(build: Build) -> None:
    trainer = prepared(build, "RaVL", "TRAINER.RAVL.LAMBDA", 0.7, "TRAINER.RAVL.TEMPERATURE", 0.1)
    batch = next(iter(trainer.encoder.batches("train")))
    alignment = trainer.encoder.align(batch)
    loss, log = trainer.objective(alignment, batch, trainer.region_features.of_step(batch))
    regions, assigned = trainer.region_features.regions("train"), trainer.attributes.discovered.found
    features = trainer.region_features.of("train", trainer.learner)
    L_R, L_A, text = [], [], alignment.text_features
    rows = [r for i in batch["index"].tolist() for r in range(len(regions.owner)) if regions.owner[r] == i]
    spurious = torch.isin(assigned.assignment["train"][rows], torch.tensor(assigned.clusters))
    image = torch.arange(len(batch["index"])).repeat_interleave(4)
    L_R, L_A = plain_losses(features[rows] @ text.T / 0.1, image, spurious, batch["label"])
    extra = torch.stack([a + b for a, b in zip(L_R, L_A, strict=True) if not a.isnan()]).mean()
    want = F.cross_entropy(alignment.logits, batch["label"]) + 0.3 / 0.7 * extra
    assert torch.allclose(loss, want, rtol=1e-5) and spurious.any() and not spurious.all()
    assert torch.allclose(log["L_R"] + log["L_A"], extra, rtol=1e-5)


def test_step_is_the_formula_over_the_image_tower(build: Build) -> None:
    trainer = prepared(build, "RaVL", *TOWER)
    assert trainer.base_name == "FineTune"
    batch = next(iter(trainer.encoder.batches("train")))
    loss, log = trainer.objective(trainer.encoder.align(batch), batch, trainer.region_features.of_step(batch))
    (gradient,) = torch.autograd.grad(loss, [trainer.learner.tower.conv1.weight], retain_graph=True)
    tower, clip = trainer.learner.tower, trainer.clip
    z = F.normalize(tower(batch["img"]), dim=-1)
    captions = [f"a photo of a {trainer.lab2cname[y]}." for y in batch["label"].tolist()]
    t = F.normalize(clip.encode_text(tokenize(captions)), dim=-1)
    own = torch.arange(len(z))
    L_CL = (F.cross_entropy(z @ t.T / 0.07, own) + F.cross_entropy(t @ z.T / 0.07, own)) / 2
    assigned = trainer.attributes.discovered.found
    rows = (4 * batch["index"].unsqueeze(1) + torch.arange(4)).flatten()
    boxes = trainer.region_features.regions("train").boxes[:4]
    f = F.normalize(trainer.learner.image_clip.region_features(batch["img"], [boxes] * len(z), "tokens"), dim=-1)
    spurious = torch.isin(assigned.assignment["train"][rows], torch.tensor(assigned.clusters))
    s = f @ trainer.learner.text_features.T / 0.07
    L_R, L_A = plain_losses(s, own.repeat_interleave(4), spurious, batch["label"])
    extra = torch.stack([a + b for a, b in zip(L_R, L_A, strict=True) if not a.isnan()]).mean()
    want = L_CL + 0.25 * extra
    assert torch.allclose(loss, want, rtol=1e-4)
    (wanted,) = torch.autograd.grad(want, [tower.conv1.weight])
    assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_fine_tuning_trains_the_tower_and_nothing_else(build: Build) -> None:
    trainer = build("FineTune", *TOWER)
    before = {name: value.clone() for name, value in trainer.clip.state_dict().items()}
    trainer.before_train()
    trainer.before_epoch()
    trainer.run_epoch()
    assert all(torch.equal(value, before[name]) for name, value in trainer.clip.state_dict().items())
    tower = trainer.learner.tower.state_dict()
    assert all(not torch.equal(value, before[f"visual.{name}"]) for name, value in tower.items())
    saved = trainer.learner.state_dict()
    assert {k for k in saved if not k.startswith("tower.")} == {"text_features"}


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_captions_and_labels_share_the_loss_of_fine_tuning(build: Build, share: float) -> None:
    trainer = build("FineTune", "TRAINER.FINETUNE.CAPTIONS", share, *TOWER)
    trainer.before_train()
    trainer.before_epoch()
    trainer.batch_idx = 0
    batch = next(iter(trainer.encoder.batches("train")))
    alignment = trainer.encoder.align(batch)
    loss, _ = trainer.objective(alignment, batch)
    ce = F.cross_entropy(alignment.logits, batch["label"])
    want = (1 - share) * ce
    if share:
        scale = torch.tensor(1 / 0.07)
        want = want + share * contrastive_loss(alignment.image_features, alignment.caption_features, scale)
    assert torch.allclose(loss, want, rtol=1e-5)


@pytest.mark.parametrize("keys", [(), tuple(TOWER)], ids=["prompts", "image_encoder"])
def test_interrupted_and_resumed_equals_never_stopped(
    keys: tuple[Any, ...], arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_resumes(arguments, tmp_path, monkeypatch, "RaVL", *ANYTHING, "DISCOVERY.EPOCHS", 1, *keys)


def test_others_take_what_was_found(found: Path, run: Callable[..., dict[str, Any]]) -> None:
    take = ("DISCOVERY.FROM", found)
    results = run("DebiasedPT", "dpt", "TRAINER.GROUPS", "regions", *take)
    assert results["groups_by"] == "regions"
    run("CoOpOOD", "anchored", "TRAINER.COOPOOD.ANCHOR", "regions", *take)
    run("RaVL", "stack", "TRAINER.STACK", "['DebiasedPT', 'CoOpOOD']", "TRAINER.GROUPS", "regions", *take)
    run("RaVL", "cocoop", "TRAINER.BASE", "CoCoOp", "OPTIM.MAX_EPOCH", 1, *take)
    run("RaVL", "maple", "TRAINER.BASE", "MaPLe", "OPTIM.MAX_EPOCH", 1, *take)


def test_presence_is_that_of_the_clusters(found: Path, build: Build) -> None:
    for count in (1, 3):
        trainer = build("RaVL", "DISCOVERY.FROM", found, "DISCOVERY.CLUSTERS", count)
        split, attribute = trainer.encoder.split("train"), trainer.attributes.discovered
        best = [c["index"] for c in read_discovery(found)["clusters"] if c["survives"]][:count]
        assigned = np.load(found / "discovery.npz")["assignment_train"].reshape(80, 4)
        present = np.isin(assigned, best).any(axis=1)
        assert attribute.of(split).tolist() == present.astype(int).tolist()
        assert torch.equal(attribute.posterior(split).argmax(dim=1), attribute.of(split))
        z = split.features()
        for value, prototype in enumerate(attribute.prototypes(split)):
            mean = z[torch.from_numpy(present == bool(value))].mean(dim=0)
            assert torch.allclose(prototype, F.normalize(mean, dim=0), atol=1e-6)


def test_train_regions_go_to_the_nearest_medoid(found: Path, build: Build) -> None:
    trainer = build("RaVL", "DISCOVERY.FROM", found)
    file = np.load(found / "discovery.npz")
    features = trainer.region_features.of("train", trainer.learner).numpy()
    assert (features @ file["medoids"].T).argmax(axis=1).tolist() == file["assignment_train"].tolist()


def test_nothing_found_is_said_plainly(arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no spurious cluster .*a normal outcome"):
        cli.run(arguments("RaVL", "none", "DISCOVERY.THRESHOLD", "2"))
    assert "None of the" in (tmp_path / "none" / "discovery.md").read_text()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (("TRAINER.RAVL.TUNE", "text"), "TUNE: unknown choice 'text'"),
        (("TRAINER.RAVL.LAMBDA", 0), "LAMBDA: 0.0 is not above 0"),
        (("TRAINER.RAVL.TEMPERATURE", 0), "TEMPERATURE: 0.0 is not possible"),
        (("REGIONS.SOURCE", "boxs"), "boxes"),
        (("REGIONS.GRID", "(2, 'a')"), "REGIONS.GRID: rows and columns"),
        (("REGIONS.FEATURES", "roi"), "a ViT has no way 'roi'"),
        (("DISCOVERY.SPLIT", "train"), "DISCOVERY.SPLIT: unknown split"),
        (("DISCOVERY.K_RANGE", "(5, 2)"), "DISCOVERY.K_RANGE"),
        (("DISCOVERY.TEMPERATURE", 0), "DISCOVERY.TEMPERATURE"),
        (("DISCOVERY.CLUSTERS", 0), "DISCOVERY.CLUSTERS: 0"),
        (("DISCOVERY.PLANTED", "rectangle"), "DISCOVERY.PLANTED: no region"),
        (("DISCOVERY.FROM", "nowhere"), "there is no nowhere"),
        ((*TOWER, "INPUT.TRANSFORMS", "('random_flip', 'normalize')"), "at random, which moves regions"),
        ((*TOWER, "TRAINER.FINETUNE.CAPTIONS", 2), "CAPTIONS is a share"),
        ((*TOWER, "TRAINER.FINETUNE.TEMPERATURE", 0), "FINETUNE.TEMPERATURE"),
    ],
    ids=lambda value: str(value[-2]) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_is_refused(keys: tuple[Any, ...], words: str, arguments: Arguments) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        cli.run(arguments("RaVL", "refused", "DISCOVERY.EPOCHS", 1, *keys))


@pytest.mark.parametrize(
    ("trainer", "words"), [("DebiasedPT", "debiasedpt weighs the cross-entropy"), ("CoOpOOD", "CoOpOOD learns its")]
)
def test_what_needs_labels_is_refused_over_captions_alone(trainer: str, words: str, arguments: Arguments) -> None:
    keys = ("--base", "FineTune", "OPTIM.MAX_EPOCH", 1, "OPTIM.LR", 1e-4)
    with pytest.raises(UserError, match=words):
        cli.run(arguments(trainer, "captions", *keys))
    cli.run(arguments(trainer, "both", *keys, "TRAINER.FINETUNE.CAPTIONS", 0.5))


def test_clusters_of_other_regions_are_refused(found: Path, arguments: Arguments, tmp_path: Path) -> None:
    for keys in (("REGIONS.GRID", "(3, 3)"), ("DATASET.SHAPES.NUM_TRAIN", 84)):
        with pytest.raises(UserError, match="is of other regions of the"):
            cli.run(arguments("RaVL", "other", "DISCOVERY.FROM", found, *keys))
    (tmp_path / "discovery.npz").write_bytes(b"PK nonsense")
    with pytest.raises(UserError, match="is not what scripts/discover.py writes"):
        cli.run(arguments("RaVL", "broken", "DISCOVERY.FROM", tmp_path))


def test_script_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no .*config.yaml"):
        script("--model-dir", tmp_path)


def test_config_file_runs_by_itself() -> None:
    args = cli.build_parser().parse_intermixed_args(
        ["--trainer", "RaVL", "--config-file", "configs/trainers/RaVL/tiny_shapes.yaml"]
    )
    cfg = cli.setup_cfg(args)
    assert cfg.DATASET.NAME == "ShapesOnScenes"


def test_mean_is_over_the_images_that_have_a_loss(build: Build) -> None:
    trainer = prepared(build, "RaVL")
    debiaser, batch = trainer.debiasers[0], next(iter(trainer.encoder.batches("train")))
    alignment, regions = trainer.encoder.align(batch), trainer.region_features.of_step(batch)
    debiaser.spurious = torch.zeros_like(debiaser.spurious)
    debiaser.spurious[regions.index[regions.image < 3]] = True  # three images have no other region
    step = Step(alignment, alignment.logits, batch["label"], batch["attribute"], batch["index"], regions)
    s = regions.features @ alignment.text_features.T / 0.07
    L_R, L_A, has = region_losses(s, regions.image, regions.image < 3, batch["label"])
    assert has.sum() == 13
    want = 0.2 / 0.8 * (L_R + L_A)[has].mean()
    assert torch.allclose(debiaser.contribute(step).per_sample_loss.mean(), want, rtol=1e-5)


def test_a_run_of_its_own_counts_as_many_clusters_as_it_is_told(build: Build) -> None:
    trainer = prepared(build, "RaVL", "DISCOVERY.CLUSTERS", 2)
    best = [c["index"] for c in read_discovery(trainer.output_dir)["clusters"] if c["survives"]]
    assert len(best) > 2 and list(trainer.attributes.discovered.found.clusters) == best[:2]
