"""The plugin inside Dassl: against a stand-in of Dassl (tests/plugin/stand_in) and trainers of the shapes of upstream's."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt import doctor
from oodprompt.backbones import CLIP, load_backbone, tokenize
from oodprompt.backbones.tokenizer import load_clip_file
from oodprompt.engine import TRAINER_REGISTRY, PromptTrainer, discover
from oodprompt.engine.optim import learning_rate
from oodprompt.errors import UserError
from oodprompt.methods.contracts import Alignment, Context, Contribution, Debiaser, Step
from tests.helpers.runs import REPOSITORY

Make = Callable[..., Any]
CLASSES = ("circle", "diamond")


class Nothing(Debiaser):
    """Adds nothing."""

    model_name = "nothing"


class Weighing(Debiaser):
    """Adds a bit of everything, in closed form."""

    model_name = "weighing"
    predicts = True

    def __init__(self, cfg: CfgNode, context: Context) -> None:
        super().__init__(cfg, context)
        self.context, self.calls = context, []
        self.bias = nn.Parameter(torch.zeros(2))
        self.register_buffer("epochs", torch.zeros(()))

    @classmethod
    def learning_rate(cls, cfg: CfgNode) -> float:
        return 0.5

    def predict(self, alignment: Alignment) -> Tensor:
        return alignment.logits + self.bias

    def other_predictions(self, alignment: Alignment) -> dict[str, Tensor]:
        return {"turned round": -alignment.logits}

    def check(self) -> None:
        self.calls.append("check")

    def before_train(self) -> None:
        self.calls.append("before_train")
        torch.rand(1), np.random.rand(1)  # what a debiaser draws must not move the base's random numbers

    def before_epoch(self, epoch: int) -> None:
        self.calls.append(f"before {epoch}")
        torch.rand(1), np.random.rand(1)

    def after_epoch(self, epoch: int) -> None:
        self.calls.append(f"after {epoch}")
        self.epochs += 1

    def before_step(self) -> None:
        self.calls.append("step")

    def contribute(self, step: Step) -> Contribution:
        weights = 1.0 + step.attribute
        return Contribution(0.5 * step.label, weights, 3 * self.bias.sum() + 7, {"index": step.index.sum().float()})


# --- trainers of other repositories ----------------------------------------------------------------------------


class TheirText(nn.Module):
    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.transformer, self.ln_final = clip.transformer, clip.ln_final
        self.positional_embedding, self.text_projection = clip.positional_embedding, clip.text_projection

    def forward(self, prompts: Tensor, tokens: Tensor) -> Tensor:
        x = self.transformer((prompts + self.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_final(x)[torch.arange(len(x)), tokens.argmax(dim=-1)] @ self.text_projection


class TheirPrompts(nn.Module):
    def __init__(self, clip: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.tokens = tokenize([f"X X {name}." for name in names])
        embedding = clip.token_embedding(self.tokens).detach()
        self.ctx = nn.Parameter(0.2 * torch.randn(2, embedding.shape[-1]))
        self.pixels = nn.Parameter(torch.zeros(3, 1, 1))  # moves images, in the trainer that has it trained
        self.half_layer = nn.Linear(1, 1).half()
        self.register_buffer("token_prefix", embedding[:, :1], persistent=False)
        self.register_buffer("token_suffix", embedding[:, 3:], persistent=False)

    def forward(self, shift: Tensor | float = 0.0) -> Tensor:
        ctx = (self.ctx + shift).expand(len(self.tokens), -1, -1)
        return torch.cat([self.token_prefix, ctx, self.token_suffix], dim=1)


class TheirModel(nn.Module):
    """``kind``: logits (CoOp), loss in training and a trained image tower (MaPLe), image (CoCoOp), pair (KgCoOp)."""

    def __init__(self, clip: nn.Module, names: list[str], kind: str) -> None:
        super().__init__()
        self.prompt_learner, self.kind = TheirPrompts(clip, names), kind
        self.image_encoder, self.text_encoder = clip.visual, TheirText(clip)
        self.logit_scale, self.dtype = clip.logit_scale, clip.visual.conv1.weight.dtype

    def forward(self, image: Tensor, label: Tensor | None = None) -> Any:
        learner, tokens, scale = self.prompt_learner, self.prompt_learner.tokens, self.logit_scale.exp()
        if self.kind == "loss":
            image = image + learner.pixels * learner.half_layer(torch.ones(1)).detach().clamp(1, 1)
        z = self.image_encoder(image)
        z = z / z.norm(dim=-1, keepdim=True)
        if self.kind == "image":
            rows = []
            for z_i in z:
                w = self.text_encoder(learner(5 * z_i[0]), tokens)
                rows.append(scale * z_i @ (w / w.norm(dim=-1, keepdim=True)).t())
            logits = torch.stack(rows)
        else:
            w = self.text_encoder(learner(), tokens)
            logits = scale * z @ (w / w.norm(dim=-1, keepdim=True)).t()
        if self.kind == "pair":
            return logits, w.square().mean()
        return F.cross_entropy(logits, label) if self.kind == "loss" and learner.training else logits


def their_trainers(TrainerX: type) -> dict[str, type]:
    """Trainer classes as upstream writes them, over the stand-in's ``TrainerX``."""
    clip_module = sys.modules["clip.clip"]

    class CoOp(TrainerX):
        kind = "logits"

        def build_model(self) -> None:
            import dassl.optim

            clip = clip_module.build_model({})
            self.model = TheirModel(clip, self.dm.dataset.classnames, self.kind)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("prompt_learner.ctx" in name or (self.kind == "loss" and "pixels" in name))
            trained = self.model if self.kind == "loss" else self.model.prompt_learner
            self.optim = dassl.optim.build_optimizer(trained, self.cfg.OPTIM)
            self.sched = dassl.optim.build_lr_scheduler(self.optim, self.cfg.OPTIM)
            self.register_model("prompt_learner", trained, self.optim, self.sched)

        def parse_batch_train(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
            return batch["img"].to(self.device), batch["label"].to(self.device)

        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label)

        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            loss = self.loss(*self.parse_batch_train(batch))
            self.model_backward_and_update(loss)
            if self.batch_idx + 1 == self.num_batches:
                self.update_lr()
            return {"loss": loss.item()}

    class MaPLe(CoOp):
        kind = "loss"

        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            loss = self.model(*self.parse_batch_train(batch))
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
            if self.batch_idx + 1 == self.num_batches:
                self.sched.step()
            return {"loss": loss.item()}

    class CoCoOp(CoOp):
        kind = "image"

    class KgCoOp(CoOp):
        kind = "pair"

        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits, score = self.model(image)
            return nn.CrossEntropyLoss()(logits, label) + 8 * score

        def model_inference(self, input: Tensor) -> Tensor:
            return self.model(input)[0]

    return {cls.__name__: cls for cls in (CoOp, MaPLe, CoCoOp, KgCoOp)}


@pytest.fixture(scope="module")
def checkout() -> Iterator[None]:
    """Dassl's stand-in and a checkout's ``clip`` on the path, with the embedded weights; gone afterwards."""
    own = load_backbone("tiny")

    def build_model(state_dict: dict[str, Tensor], design: Any = None) -> nn.Module:
        clip = load_clip_file("model").CLIP(*astuple(own.shape)).eval().requires_grad_(False)
        clip.load_state_dict({key: value.half().float() for key, value in own.state_dict().items()})  # as upstream's
        clip.visual.VPT = nn.Parameter(torch.zeros(2, 3))  # as upstream's prompted towers have
        return clip

    before = set(sys.modules)
    sys.path.insert(0, str(REPOSITORY / "tests" / "plugin" / "stand_in"))
    sys.modules["clip.clip"] = module = ModuleType("clip.clip")
    module.build_model = build_model
    yield
    sys.path.remove(str(REPOSITORY / "tests" / "plugin" / "stand_in"))
    for name in set(sys.modules) - before:
        if name.startswith(("dassl", "oodprompt.plugin", "gdown", "clip")):
            del sys.modules[name]


@pytest.fixture(scope="module")
def plugin(checkout: None) -> ModuleType:
    return importlib.import_module("oodprompt.plugin")


@pytest.fixture
def theirs(plugin: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Their trainers, registered, and debiasers of ours that are made for tests."""
    engine = importlib.import_module("dassl.engine")
    ours = importlib.import_module("oodprompt.plugin.trainers").OURS
    monkeypatch.setattr(engine.TRAINER_REGISTRY, "_obj_map", dict(engine.TRAINER_REGISTRY._obj_map))
    monkeypatch.setattr(TRAINER_REGISTRY, "_objects", dict(TRAINER_REGISTRY._objects))
    monkeypatch.setattr(importlib.import_module("oodprompt.plugin.adapters"), "_ADAPTERS", {})
    monkeypatch.setattr(importlib.import_module("oodprompt.plugin.trainers"), "OURS", set(ours))
    for debiaser in (Nothing, Weighing):
        TRAINER_REGISTRY.register(type(f"With{debiaser.__name__}", (PromptTrainer,), {"debiaser_class": debiaser}))
        plugin.register_debiaser(f"With{debiaser.__name__}")
    trainers = their_trainers(engine.TrainerX)
    for trainer in trainers.values():
        engine.TRAINER_REGISTRY.register(trainer)
    return trainers


@pytest.fixture
def make(theirs: dict[str, type], data_root: Path, tmp_path: Path) -> Make:
    """``make(trainer, base, KEY, VALUE, ...)``: a trainer of the stand-in's ``build_trainer``."""

    def build(name: str, base: str = "", *opts: Any, out: str = "out") -> Any:
        cfg = importlib.import_module("dassl.config").get_cfg_default()
        cfg.merge_from_list(["TRAINER.NAME", name, "TRAINER.BASE", base, "SEED", 3, "DATASET.ROOT", str(data_root)])
        cfg.merge_from_list(["DATASET.NAME", "OODShapesOnScenes", "DATASET.SHAPES.NUM_TRAIN", 36])
        cfg.merge_from_list(["DATASET.SHAPES.NUM_VAL", 8, "DATASET.SHAPES.NUM_TEST", 12, "INPUT.SIZE", (48, 48)])
        cfg.merge_from_list(["INPUT.TRANSFORMS", ("normalize",), "DATALOADER.TRAIN_X.BATCH_SIZE", 12])
        cfg.merge_from_list(["DATASET.SHAPES.CORRELATION", 0.8, "OPTIM.LR", 0.01, "OPTIM.MAX_EPOCH", 2])
        cfg.merge_from_list(["OPTIM.WARMUP_EPOCH", 1, "OPTIM.WARMUP_CONS_LR", 1e-3, "MODEL.BACKBONE.NAME", "tiny"])
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / out), *opts])
        cfg.freeze()
        torch.manual_seed(cfg.SEED)
        return importlib.import_module("dassl.engine").build_trainer(cfg)

    return build


@torch.no_grad()
def predictions(trainer: Any) -> Tensor:
    """Logits of the first test images."""
    trainer.set_model_mode("eval")
    return trainer.model_inference(next(iter(trainer.test_loader))["img"])


# --- registration and keys -------------------------------------------------------------------------------------


def test_import_registers_trainers_data_sets_and_keys(plugin: ModuleType) -> None:
    from dassl.config import get_cfg_default
    from dassl.data.datasets import DATASET_REGISTRY
    from dassl.engine import TRAINER_REGISTRY as THEIRS

    assert {"CoOpOOD", "DebiasedPT", "RaVL"} <= set(THEIRS.registered_names())
    names = DATASET_REGISTRY.registered_names()
    assert {"OODWaterbirds", "OODShapesOnScenes", "OODCSV"} <= set(names)
    assert all(name.startswith(plugin.PREFIX) for name in names)
    cfg = get_cfg_default()
    assert cfg.TRAINER.COOPOOD.ALPHA == 0.1 and cfg.TRAINER.BASE == "" and cfg.DISCOVERY.THRESHOLD == 0.25
    assert cfg.OPTIM.LR == 0.0003 and cfg.OUTPUT_DIR == "./output", "Dassl's own defaults stay"
    assert "COOP" not in cfg.TRAINER and "FEATURE_CACHE" not in cfg.DATALOADER, "what does nothing here is not offered"


def test_extend_cfg_keeps_what_is_there(plugin: ModuleType) -> None:
    cfg = CfgNode({"TRAINER": {"NAME": "x", "COOPOOD": {"ALPHA": 7.0}}})
    plugin.extend_cfg(cfg)
    assert cfg.TRAINER.COOPOOD.ALPHA == 7.0 and cfg.TRAINER.COOPOOD.BETA == 1.0 and cfg.TRAINER.NAME == "x"
    once = cfg.clone()
    plugin.extend_cfg(cfg)
    assert cfg == once


def test_a_config_made_before_the_import_gets_the_keys(make: Make) -> None:
    trainer = make("WithNothing", "CoOp")
    from dassl.engine import build_trainer

    cfg = trainer.cfg.clone()
    cfg.defrost()
    del cfg["DISCOVERY"], cfg.TRAINER["COOPOOD"], cfg.TRAINER["STACK"]
    assert build_trainer(cfg).cfg.TRAINER.COOPOOD.ALPHA == 0.1 and "COOPOOD" not in cfg.TRAINER


def test_methods_of_others_come_with_their_keys(make: Make, theirs: dict[str, type]) -> None:
    """By what is imported after the plugin, or by OODPROMPT_IMPORT ahead of it."""
    from dassl.config import get_cfg_default

    from oodprompt.config import keys

    keys.declare("TRAINER.LATER", {"POWER": (1.0, "x")})
    try:
        TRAINER_REGISTRY.register(type("Later", (PromptTrainer,), {"debiaser_class": Nothing, "__doc__": "x"}))
        importlib.import_module("oodprompt.plugin").register_debiaser("Later")
        assert get_cfg_default().TRAINER.LATER.POWER == 1.0
        assert make("Later", "CoOp", "TRAINER.LATER.POWER", 0.5).companion.cfg.TRAINER.LATER.POWER == 0.5
    finally:
        del keys._KEYS["TRAINER.LATER.POWER"], importlib.import_module("dassl.config").defaults._C.TRAINER["LATER"]


def test_an_imported_file_is_registered_with_dassl(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "your_method.md").read_text().split("## A debiaser")[1]
    (tmp_path / "my_debiaser.py").write_text(page.split("```python\n")[1].split("```")[0])
    code = (
        "import oodprompt.plugin, dassl.engine as e, dassl.config as c\n"
        "print('RareFirst' in e.TRAINER_REGISTRY.registered_names(), c.get_cfg_default().TRAINER.RAREFIRST.POWER)\n"
        "print('GroupDRO' in e.TRAINER_REGISTRY.registered_names())"
    )
    environment = {**os.environ, "OODPROMPT_IMPORT": "my_debiaser.py"}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY / "tests" / "plugin" / "stand_in"), str(REPOSITORY)])
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert shown.stdout == "True 1.0\nFalse\n", shown.stderr


def test_the_launcher_without_dassl_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "dassl").mkdir()  # a folder of that name is no Dassl
    shown = subprocess.run(
        [sys.executable, "-m", "oodprompt.plugin", "train.py"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        shown.returncode == 2 and shown.stderr.count("\n") == 1 and shown.stderr.startswith("error: oodprompt.plugin")
    )


def test_without_dassl_the_import_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    spec = importlib.util.spec_from_file_location("plugin_alone", REPOSITORY / "oodprompt" / "plugin" / "__init__.py")
    with pytest.raises(ImportError, match=r"not installed: git clone https://github.com/KaiyangZhou") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert isinstance(caught.value, UserError)


def test_our_data_set_keeps_attributes_and_has_what_dassl_asks_for(make: Make) -> None:
    data = make("CoOp").dm.dataset
    assert len(data.train_x) == 36 and data.train_x[0].attribute >= 0 and data.train_u is None
    assert data.lab2cname == dict(enumerate(CLASSES)) and data.num_classes == 2 and data.classnames == list(CLASSES)
    assert data.attribute_names == ("water", "land") and len(data.attribute_prompts) == 2


def test_a_data_set_of_theirs(plugin: ModuleType, make: Make) -> None:
    from dassl.data.datasets import DatasetBase, Datum

    from oodprompt.plugin.datasets import TheirDataset

    ours = make("CoOp").dm.dataset
    images = [Datum(d.impath, d.label, 1, d.classname) for d in ours.train_x]
    cfg = importlib.import_module("oodprompt.plugin.keys").own_cfg(make("CoOp").cfg)
    cfg.DATASET.ATTRIBUTE_NAMES = ("sea", "field")
    seen = TheirDataset(cfg, DatasetBase(train_x=images, test=images[:4]))
    assert [d.attribute for d in seen.train_x] == [-1] * 36 and seen.val == [] and len(seen.test) == 4
    assert [(d.impath, d.label, d.domain) for d in seen.train_x] == [(d.impath, d.label, 1) for d in images]
    assert seen.attribute_prompts == [("a photo of sea.",), ("a photo of field.",)]
    images[0].attribute = 1
    assert TheirDataset(cfg, DatasetBase(train_x=images, test=images)).train_x[0].attribute == 1


def test_our_tree_from_theirs(make: Make) -> None:
    own_cfg = importlib.import_module("oodprompt.plugin.keys").own_cfg
    opts = ["INPUT.TRANSFORMS", ("randaugment2", "normalize"), "DATASET.NUM_SHOTS", 4, "TRAINER.COOPOOD.BETA", 5.0]
    cfg = make("CoOp", "", *opts).cfg
    own = own_cfg(cfg)
    assert own.INPUT.TRANSFORMS == ("random_flip", "normalize") and own.DATASET.NUM_SHOTS == -1
    assert own.TRAINER.COOPOOD.BETA == 5.0 and own.SEED == 3 and own.INPUT.SIZE == (48, 48)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED, cfg.INPUT.TRANSFORMS = -1, ["normalize"]
    assert own_cfg(cfg).SEED == 3 == torch.initial_seed() and own_cfg(cfg).INPUT.TRANSFORMS == ("normalize",)


# --- what is broken in Dassl -----------------------------------------------------------------------------------


def test_all_that_the_doctor_knows_is_mended_once(plugin: ModuleType) -> None:
    assert set(importlib.import_module("oodprompt.plugin.repair").MENDERS) == set(doctor.BREAKAGES)
    assert plugin.repair_dassl() == []


def test_warm_up_runs_and_gives_dassls_rates(plugin: ModuleType) -> None:
    from dassl.config import get_cfg_default
    from dassl.optim import build_lr_scheduler

    from oodprompt.config.keys import get_cfg_default as own_default

    cfg, own = get_cfg_default(), own_default()
    for tree in (cfg, own):
        tree.OPTIM.LR, tree.OPTIM.MAX_EPOCH, tree.OPTIM.WARMUP_EPOCH = 0.1, 5, 2
    own.OPTIM.LR_SCHEDULER, own.OPTIM.WARMUP_TYPE = "cosine", "constant"
    optim = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    sched = build_lr_scheduler(optim, cfg.OPTIM)
    for epoch in range(5):
        assert optim.param_groups[0]["lr"] == pytest.approx(learning_rate(epoch, 0.1, own.OPTIM))
        optim.step()
        sched.step()


class _Bad:
    def __reduce__(self) -> tuple[Any, Any]:
        return (os.mkdir, ("should_not_be_made",))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*TorchScript:UserWarning")
def test_checkpoints_load_without_running_code(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dassl.optim import build_lr_scheduler
    from dassl.utils import load_checkpoint, save_checkpoint

    monkeypatch.chdir(tmp_path)
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.OPTIM.WARMUP_EPOCH = 1
    optim = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    sched = build_lr_scheduler(optim, cfg.OPTIM)
    state = {"state_dict": {"a": torch.ones(2)}, "epoch": 3, "scheduler": sched.state_dict(), "optimizer": None}
    save_checkpoint({**state, "val_result": np.float64(81.5)}, "run")
    loaded = load_checkpoint("run/model.pth.tar-3")
    assert loaded["val_result"] == 81.5 and type(loaded["scheduler"]["successor"]) is type(sched.successor)
    save_checkpoint({**state, "val_result": None}, "run")
    assert np.isnan(load_checkpoint("run/model.pth.tar-3")["val_result"]), "which a format of numbers can print"
    torch.jit.script(nn.Linear(1, 1)).save("run/model.pth.tar-3")
    with pytest.raises(RuntimeError, match="TorchScript"):
        load_checkpoint("run/model.pth.tar-3")
    save_checkpoint({**state, "bad": _Bad()}, "run")
    assert load_checkpoint("run/model.pth.tar-3")["state_dict"]["a"].tolist() == [1, 1]
    assert not Path("should_not_be_made").exists()
    state["scheduler"]["successor"] = optim  # of another torch or as they come: optimisers hold a defaultdict
    optim.param_groups[0]["params"][0].grad = torch.ones(1)
    optim.step()
    save_checkpoint(state, "run")
    assert type(load_checkpoint("run/model.pth.tar-3")["scheduler"]["successor"]) is torch.optim.SGD


def test_numbers_of_older_numpys_are_read(plugin: ModuleType) -> None:
    unpickler = importlib.import_module("oodprompt.plugin.repair")._DasslUnpickler
    data = pickle.dumps(np.float64(2.5), protocol=2)
    for name in (b"numpy.core.multiarray", b"numpy._core.multiarray"):
        old = data.replace(b"numpy._core.multiarray", name).replace(b"numpy.core.multiarray", name)
        assert unpickler(io.BytesIO(old)).load() == 2.5


def test_transforms_and_missing_packages(plugin: ModuleType) -> None:
    from dassl.data.datasets import DatasetBase
    from dassl.data.transforms import autoaugment, randaugment

    assert randaugment.levels([1.5]).tolist() == [1] and autoaugment.posterize()[0] == 8
    assert not hasattr(np, "int"), "numpy itself is left alone"
    assert importlib.util.find_spec("gdown") is not None, "others may ask whether it is there"
    with pytest.raises(UserError, match="pip install gdown"):
        DatasetBase.download_data(None, "address", "file")


def test_repair_can_be_left_out(checkout: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("dassl", "gdown") or "oodprompt.plugin" in name
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("OODPROMPT_REPAIR", "0")
    with pytest.raises(ModuleNotFoundError, match="gdown"):
        importlib.import_module("oodprompt.plugin")


# --- the wrapped step ------------------------------------------------------------------------------------------


def test_cross_entropy_is_exchanged_however_it_is_called(plugin: ModuleType) -> None:
    from torch.nn.functional import cross_entropy

    Instead = importlib.import_module("oodprompt.plugin.trainers").CrossEntropyInstead
    x, y, given = torch.randn(3, 2), torch.tensor([0, 1, 1]), []

    def replace(logits: Tensor, target: Tensor, **rest: Any) -> Tensor | None:
        given.append((logits is x and target is y, rest["reduction"]))
        return torch.tensor(5.0) if rest["reduction"] == "mean" else None

    plain = F.cross_entropy(x, y, reduction="none")
    with Instead(replace):
        assert F.cross_entropy(x, y) == cross_entropy(x, y) == nn.CrossEntropyLoss()(x, y) == 5
        assert torch.equal(F.cross_entropy(x, y, reduction="none"), plain)
        assert F.mse_loss(x, x) == 0
    assert F.cross_entropy(x, y) == pytest.approx(plain.mean().item()) and given == [(True, "mean")] * 3 + [
        (True, "none")
    ]


@pytest.mark.parametrize("base", ["CoOp", "MaPLe", "CoCoOp", "KgCoOp"])
def test_nothing_added_changes_nothing(make: Make, theirs: dict[str, type], base: str) -> None:
    small = ["DATALOADER.TRAIN_X.BATCH_SIZE", 4, "OPTIM.MAX_EPOCH", 1] if base == "CoCoOp" else []
    plain = make(base, "", *small, out="plain")
    plain.model.float()
    plain.train()
    wrapped = make("WithNothing", base, *small, out="wrapped")
    wrapped.train()
    a, b = ([row["loss"] for row in trainer.history] for trainer in (plain, wrapped))
    assert len(a) == len(b) > 5 and a[0] != a[-1]
    assert np.abs(np.subtract(a, b)).max() < 1e-5
    for key, value in plain._models["prompt_learner"].state_dict().items():
        torch.testing.assert_close(wrapped._models["prompt_learner"].state_dict()[key], value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predictions(wrapped), predictions(plain), atol=1e-4, rtol=1e-4)
    assert theirs[base] in type(wrapped).__mro__ and type(wrapped).__name__ == f"WithNothingOver{base}"


@pytest.mark.parametrize("base", ["CoOp", "MaPLe", "KgCoOp"])
def test_the_objective_and_one_step_by_hand(make: Make, base: str) -> None:
    trainer = make("WithWeighing", base)
    debiaser = trainer.companion.debiasers[0]
    trainer.before_train(), trainer.before_epoch(), trainer.set_model_mode("train")
    batch = next(iter(trainer.train_loader_x))
    label, data = batch["label"], trainer.dm.dataset.train_x
    attribute = torch.tensor([data[i].attribute for i in batch["index"]])
    with torch.no_grad():
        trainer.set_model_mode("eval")
        output = trainer.model(batch["img"])
        logits, score = output if base == "KgCoOp" else (output, None)
        trainer.set_model_mode("train")
        weights = 1.0 + attribute
        expected = (weights * (F.cross_entropy(logits, label, reduction="none") + 0.5 * label)).mean() + 7
        extra = 0 if score is None else 8 * score
        probability = logits.softmax(dim=1) - F.one_hot(label, 2)
        gradient = (weights.unsqueeze(1) * probability).mean(dim=0) + 3
    trainer.num_batches, trainer.batch_idx = 9, 0
    summary = trainer.forward_backward(batch)
    assert summary["loss"] == pytest.approx(float(expected + extra), rel=1e-5)
    assert summary["index"] == batch["index"].sum() and "acc" in summary
    # Warm-up: 1e-3 for every group; decay of a zero bias is zero. The bias has moved once, not twice.
    torch.testing.assert_close(debiaser.bias.detach(), -1e-3 * gradient, atol=1e-6, rtol=1e-4)
    assert debiaser.calls == ["check", "before_train", "before 0", "step"]


def test_debiasers_compute_in_full_precision(make: Make, theirs: dict[str, type]) -> None:
    seen = []

    class Mixed(theirs["CoOp"]):
        def forward_backward(self, batch: dict[str, Any]) -> dict[str, float]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward_backward(batch)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Mixed)
    trainer = make("WithWeighing", "Mixed")
    contribute = trainer.companion.debiasers[0].contribute

    def watched(step: Step) -> Contribution:
        seen.append((torch.is_autocast_enabled("cpu"), step.logits.dtype, step.alignment.image_features.dtype))
        return contribute(step)

    trainer.companion.debiasers[0].contribute = watched
    trainer.train()
    assert set(seen) == {(False, torch.float32, torch.float32)}


def test_the_debiasers_own_rate_follows_the_schedule(make: Make) -> None:
    trainer = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 4)
    base, own = trainer.optim.param_groups
    assert own["params"] == [trainer.companion.debiasers[0].bias] and own["weight_decay"] == base["weight_decay"]
    rates = []
    for _ in range(4):
        rates.append((base["lr"], own["lr"]))
        trainer.optim.step(), trainer.update_lr()
    cosine = [(1 + np.cos(np.pi * t / 4)) / 2 for t in range(3)]
    assert rates == [(1e-3, 1e-3)] + [pytest.approx((0.01 * c, 0.5 * c)) for c in cosine]
    assert trainer.sched is trainer._scheds["prompt_learner"] and list(trainer._optims.values())[1] is None


def test_random_numbers_stay_those_of_the_base(make: Make) -> None:
    plain = make("CoOp", out="plain")
    after_plain = torch.rand(3)
    wrapped = make("WithWeighing", "CoOp", out="wrapped")
    assert torch.equal(torch.rand(3), after_plain)
    torch.manual_seed(0), np.random.seed(0)
    wrapped.before_train(), wrapped.before_epoch()
    drawn = torch.rand(1), np.random.rand(1)
    torch.manual_seed(0), np.random.seed(0)
    assert drawn == (torch.rand(1), np.random.rand(1))
    torch.testing.assert_close(wrapped.model.prompt_learner.ctx, plain.model.prompt_learner.ctx)


@pytest.mark.parametrize(
    ("trainer", "opts"),
    [
        ("CoOpOOD", []),
        ("CoOpOOD", ["TRAINER.COOPOOD.ANCHOR", "attributes"]),
        ("DebiasedPT", ["TRAINER.DEBIASEDPT.MEASURE", "held_out"]),
        (
            "CoOpOOD",
            ["TRAINER.STACK", ("DebiasedPT",), "TRAINER.GROUPS", "true", "TRAINER.COOPOOD.ANCHOR", "attributes"],
        ),
    ],
)
@pytest.mark.parametrize("base", ["CoOp", "MaPLe"])
def test_our_methods_train_save_and_load(make: Make, trainer: str, opts: list[Any], base: str) -> None:
    run = make(trainer, base, *opts)
    start = [p.detach().clone() for d in run.companion.debiasers for p in d.parameters()]
    run.train()
    moved = [p for d in run.companion.debiasers for p in d.parameters()]
    assert all(np.isfinite(row["loss"]) for row in run.history) and len(run.history) == 6
    assert all(not torch.equal(before, after) for before, after in zip(start, moved, strict=True))
    again = make(trainer, base, *opts)
    again.load_model(run.output_dir, epoch=2)
    assert torch.equal(predictions(again), predictions(run))
    assert [d.model_name for d in run.companion.debiasers] == list(run._models)[1:]
    resumed = make(trainer, base, *opts, "OPTIM.MAX_EPOCH", 3)
    resumed.train()
    assert resumed.start_epoch == 2 and len(resumed.history) == 3


def test_plain_and_wrapped_checkpoints_fit_each_other(make: Make) -> None:
    make("CoOp", out="plain").train()
    wrapped = make("WithNothing", "CoOp", out="wrapped")
    wrapped.train()
    plain = make("CoOp", out="other")
    plain.load_model(wrapped.output_dir, epoch=2)
    assert torch.equal(plain.model.prompt_learner.ctx, wrapped.model.prompt_learner.ctx)


def test_debiasers_hear_of_epochs_before_they_are_saved(make: Make) -> None:
    trainer = make("WithWeighing", "MaPLe")
    trainer.train()
    calls = ["before 0", *["step"] * 3, "after 0", "before 1", *["step"] * 3, "after 1"]
    assert trainer.companion.debiasers[0].calls == ["check", "before_train", *calls]
    saved = torch.load(Path(trainer.output_dir) / "weighing" / "model.pth.tar-2", weights_only=True)
    assert saved["state_dict"]["epochs"] == 2 and torch.equal(
        saved["state_dict"]["bias"], trainer.companion.debiasers[0].bias
    )


def test_models_of_different_epochs_go_back_to_the_newest_of_all(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    for epochs in (1, 2):
        make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", epochs).train()
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    out = Path(run.output_dir)
    (out / "weighing" / "checkpoint").write_text("model.pth.tar-1\n")  # killed between two saves
    run.before_train()
    first = torch.load(out / "prompt_learner" / "model.pth.tar-1", weights_only=False)["state_dict"]["ctx"]
    assert run.start_epoch == 1 and torch.equal(run.model.prompt_learner.ctx, first)
    assert run.companion.start_epoch == 1 and run.companion.debiasers[0].epochs == 1
    assert "going back to model.pth.tar-1, the newest that all models have" in capsys.readouterr().out
    # With FINAL_MODEL best_val Dassl's pointer names the best model, here of one epoch in both folders or of two.
    for name in run._models:
        (out / name / "model-best.pth.tar").write_bytes((out / name / "model.pth.tar-2").read_bytes())
        (out / name / "checkpoint").write_text("model-best.pth.tar\n")
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    run.before_train()
    assert run.start_epoch == 2 and "going back" not in capsys.readouterr().out
    (out / "weighing" / "model-best.pth.tar").write_bytes((out / "weighing" / "model.pth.tar-1").read_bytes())
    run = make("WithWeighing", "CoOp", "OPTIM.MAX_EPOCH", 3)
    run.before_train()
    assert run.start_epoch == 1 and "going back to model.pth.tar-1" in capsys.readouterr().out
    for file in out.glob("weighing/*"):  # killed ahead of the first save of a debiaser
        file.unlink()
    run = make("WithWeighing", "CoOp")
    run.before_train()
    assert run.start_epoch == 0 and "train from scratch" in capsys.readouterr().out


def test_a_finished_run_prepares_nothing(make: Make) -> None:
    make("WithWeighing", "CoOp").train()
    again = make("WithWeighing", "CoOp")
    again.train()
    assert again.companion.debiasers[0].calls == []


def test_base_to_new_classes(make: Make) -> None:
    keys = [
        "DATASET.SHAPES.CLASSES",
        ("circle", "diamond", "square"),
        "DATASET.SHAPES.SCENES",
        ("water", "land", "sky"),
    ]
    keys += ["DATASET.SHAPES.NUM_VAL", 9, "DATASET.SUBSAMPLE_CLASSES"]
    stack = ["TRAINER.STACK", ("CoOpOOD",), "TRAINER.COOPOOD.ANCHOR", "attributes"]
    run = make("DebiasedPT", "CoOp", *keys, "base", *stack)
    assert run.companion.num_classes == run.dm.num_classes == 2 and run.companion.debiasers[0].w.shape == (6,)
    run.train()
    new = make("DebiasedPT", "CoOp", *keys, "new", *stack, out="new")
    assert new.companion.num_classes == 1 and new.companion.debiasers[0].w.shape == (3,)
    new.load_model(run.output_dir, epoch=2)
    own, other = new.companion.debiasers[1].state_dict(), run.companion.debiasers[1].state_dict()
    assert torch.equal(own["h_u.weight"], other["h_u.weight"])
    assert new.test() == 100


def test_what_counts_for_other_classes_is_left(make: Make) -> None:
    trainer = make("CoOpOOD", "MaPLe", "TRAINER.COOPOOD.ANCHOR", "attributes")
    debiaser = trainer.companion.debiasers[0]
    state = {key: value.clone() + 1 for key, value in debiaser.state_dict().items()}
    other = {**state, "running.cross": torch.zeros(5, 2, 2), "running.count": torch.zeros(5)}
    before = debiaser.running.cross.clone()
    debiaser.load_state_dict(other, strict=False)
    assert torch.equal(debiaser.running.cross, before) and torch.equal(debiaser.h_u.weight, state["h_u.weight"])
    debiaser.load_state_dict(state)
    assert torch.equal(debiaser.running.cross, state["running.cross"])


# --- context ---------------------------------------------------------------------------------------------------


def test_the_context_is_that_of_clip_and_the_data(make: Make) -> None:
    trainer = make("WithWeighing", "CoOp")
    context, clip = trainer.companion.debiasers[0].context, load_backbone("tiny")
    clip.load_state_dict({key: value.half().float() for key, value in clip.state_dict().items()})
    assert context.features_are_frozen and context.data.classnames == list(CLASSES)
    assert all(
        torch.equal(a, b) for a, b in zip(clip.state_dict().values(), context.clip.state_dict().values(), strict=True)
    )
    loader = torch.utils.data.DataLoader(trainer.train_loader_x.dataset, 100)
    batch = next(iter(loader))
    expected = F.normalize(clip.encode_image(batch["img"]), dim=-1)
    torch.testing.assert_close(context.data.train.features(), expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(context.data.train.label, batch["label"])
    assert context.data.train.attribute.tolist() == [d.attribute for d in trainer.dm.dataset.train_x]
    assert len(context.data.val.label) == 8 and context.attributes.num_groups() == 4
    assert trainer.companion.attributes["val"].tolist() == [d.attribute for d in trainer.dm.dataset.val]
    trainer.set_model_mode("train")
    z, logits = context.first_stage.outputs(context.data.val)
    with torch.no_grad():
        images = next(iter(trainer.val_loader))["img"]
        torch.testing.assert_close(logits, trainer.model(images), atol=1e-3, rtol=1e-4)
    assert z.shape == (8, clip.shape.embed_dim) and trainer.model.prompt_learner.training


def test_an_image_tower_of_their_own_is_noticed(make: Make, theirs: dict[str, type]) -> None:
    class Shifted(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            with torch.no_grad():
                self.model.image_encoder.proj.copy_(self.model.image_encoder.proj.flip(1))

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Shifted)
    assert not make("WithWeighing", "Shifted").companion.debiasers[0].context.features_are_frozen


def test_the_first_clip_that_is_built_is_the_frozen_one(make: Make, theirs: dict[str, type]) -> None:
    class TwoClips(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            module, build = sys.modules["clip.clip"], sys.modules["clip.clip"].build_model
            teacher = build({})
            assert teacher is not None and module.build_model is build

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(TwoClips)
    state = load_backbone("tiny").state_dict()
    own = make("WithWeighing", "TwoClips").companion.clip.state_dict()
    assert torch.equal(own["visual.proj"], state["visual.proj"].half().float())


def test_a_trained_image_tower_is_noticed(make: Make) -> None:
    trainer = make("WithWeighing", "MaPLe")
    assert not trainer.companion.debiasers[0].context.features_are_frozen
    assert trainer.model.prompt_learner.half_layer.weight.dtype == torch.float32, "fp32 throughout, as its towers are"


def test_what_cannot_be_here_says_so(make: Make, theirs: dict[str, type]) -> None:
    context = make("WithWeighing", "CoOp").companion.debiasers[0].context
    with pytest.raises(UserError, match="CoOp trained alone, which cannot be done.*DISCOVERY.FROM"):
        context.first_stage.fit(1, None)
    with pytest.raises(UserError, match="'ctx' of the prompt learner, which CoOp"):
        _ = context.learner.ctx
    with pytest.raises(UserError, match="the parameters of CoOp"):
        context.learner.parameters()
    assert not hasattr(context.learner, "anything")
    with pytest.raises(UserError, match="RWG chooses the images of an epoch"):
        make("WithNothing", "CoOp", "TRAINER.STACK", ("RWG",))
    with pytest.raises(UserError, match="RaVL needs features of regions, and MaPLe trains"):
        make("RaVL", "MaPLe")
    with pytest.raises(UserError, match="no trainer 'MaPLE' is registered with Dassl here .did you mean 'MaPLe'"):
        make("CoOpOOD", "MaPLE")
    with pytest.raises(UserError, match="no trainer 'DebiasedPT'"):
        make("CoOpOOD", "DebiasedPT")
    with pytest.raises(UserError, match="TRAINER.STACK: CoOp is a prompt learner"):
        make("CoOpOOD", "CoOp", "TRAINER.STACK", ("CoOp",))


def test_an_empty_base_is_coop_of_the_checkout(make: Make, theirs: dict[str, type]) -> None:
    trainer = make("CoOpOOD")
    assert theirs["CoOp"] in type(trainer).__mro__
    assert trainer.model.prompt_learner.training, "modes are left as they were built"


def test_ravl_with_found_regions(make: Make, tmp_path: Path) -> None:
    from oodprompt.regions.boxes import digest

    with pytest.raises(UserError, match="DISCOVERY.FROM"):
        make("RaVL", "CoOp").before_train()
    trainer = make("RaVL", "CoOp", "DISCOVERY.FROM", str(tmp_path))
    regions = discover.regions_of(trainer.companion, "train")
    assignment = np.arange(len(regions.owner)) % 4
    content = {"clusters": np.array([2]), "assignment_train": assignment, "digest_train": np.array(digest(regions))}
    buffer = io.BytesIO()
    np.savez(buffer, **content)
    (tmp_path / "discovery.npz").write_bytes(buffer.getvalue())
    trainer.before_train(), trainer.set_model_mode("train")
    assert trainer.companion.debiasers[0].spurious.tolist() == [a == 2 for a in assignment]
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 9, 0
    ce = F.cross_entropy(trainer.model(batch["img"]), batch["label"]).item()
    summary = trainer.forward_backward(batch)
    assert summary["L_R"] > 0 and summary["loss"] == pytest.approx(
        ce + 0.2 / 0.8 * (summary["L_R"] + summary["L_A"]), rel=1e-4
    )
    clip: CLIP = trainer.companion.clip
    boxes = regions.boxes.view(36, 4, 4)[batch["index"]]
    expected = F.normalize(clip.region_features(batch["img"], list(boxes), "auto").float(), dim=-1)
    found = trainer.companion.region_features.of_step(batch).features
    torch.testing.assert_close(found, expected.detach(), atol=1e-4, rtol=1e-3)


# --- evaluation ------------------------------------------------------------------------------------------------


def test_groups_are_reported_and_the_prediction_is_the_debiasers(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make("WithWeighing", "CoOp")
    with torch.no_grad():
        trainer.companion.debiasers[0].bias[:] = torch.tensor([1e4, 0])  # every image is a circle
    accuracy = trainer.test()
    out = capsys.readouterr().out
    assert accuracy == 50 and "* worst_group: 0.0%" in out and "* gap: 50.0%" in out
    assert "| circle / water  |" in out and "* turned round, worst_group:" in out
    assert trainer.scalars["test/worst_group_accuracy"] == 0 and trainer.scalars["test/gap"] == pytest.approx(0.5)
    trainer.companion.attributes["val"][:] = 0
    val, trainer.val_loader, trainer.scalars = trainer.val_loader, None, {}
    trainer.test(split="val")
    assert "test/gap" in trainer.scalars, "without validation images Dassl tests"
    capsys.readouterr()
    trainer.val_loader = val
    trainer.test(split="val")
    assert trainer.scalars["val/gap"] == pytest.approx(0.5) and "/ land" not in capsys.readouterr().out


def test_without_attributes_there_are_no_groups(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make("WithNothing", "CoOp")
    trainer.companion.attributes["test"][:] = -1
    trainer.test()
    assert "worst_group" not in capsys.readouterr().out


# --- adapters --------------------------------------------------------------------------------------------------


def features(model: TheirModel, batch: dict[str, Any]) -> Alignment:
    """An adapter for the model of the trainer ``Odd``."""
    image = model.tower(batch["img"])
    text = model.text_encoder(model.prompt_learner(), model.prompt_learner.tokens)
    return Alignment(F.normalize(image, dim=-1), F.normalize(text, dim=-1), model.logit_scale.exp())


@pytest.fixture
def odd(theirs: dict[str, type]) -> type:
    """A trainer whose model has its image tower under another name."""

    class Odd(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self.model.tower = self.model.image_encoder
            del self.model.image_encoder

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Odd)
    return Odd


def test_a_model_of_another_shape_is_told_what_to_write(make: Make, odd: type) -> None:
    with pytest.raises(UserError, match="TRAINER.BASE Odd: its model, TheirModel, has no image_encoder") as caught:
        make("WithNothing", "Odd")
    code = str(caught.value).split("adapter:\n")[1]
    compile(code.replace("\n    ", "\n"), "example", "exec")
    assert '@register_adapter("Odd")' in code


def test_an_adapter_takes_its_place(make: Make, plugin: ModuleType, odd: type) -> None:
    plain = make("WithNothing", "CoOp", out="plain")
    plain.train()
    assert plugin.register_adapter("Odd")(features) is features
    odd.forward_backward = None
    adapted = make("WithNothing", "Odd", out="adapted")
    adapted.train()
    a, b = ([row["loss"] for row in trainer.history] for trainer in (plain, adapted))
    assert np.abs(np.subtract(a, b)).max() < 1e-5
    assert adapted.companion.debiasers[0] and not adapted.companion.learner.trains_image_tower
    plugin.register_adapter("Odd", lambda model, batch: (features(model, batch), torch.tensor(2.0)))
    half = features(adapted.model, next(iter(adapted.test_loader)))
    half = Alignment(half.image_features.half(), half.text_features.half(), half.logit_scale)
    alignment, own = importlib.import_module("oodprompt.plugin.adapters").call_adapter(lambda *_: half, None, {})
    assert alignment.logits.dtype == torch.float32 and own is None
    more = make("WithNothing", "Odd", out="more")
    more.train()
    assert more.history[0]["loss"] == pytest.approx(a[0] + 2, abs=1e-4)


def test_logits_of_another_kind_are_refused(make: Make, theirs: dict[str, type]) -> None:
    registry = importlib.import_module("dassl.engine").TRAINER_REGISTRY

    class Tempered(theirs["CoOp"]):
        def model_inference(self, input: Tensor) -> Tensor:
            return 1.5 * self.model(input)

    class Pairs(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.multi_margin_loss(self.model(image), label)

    class Smoothed(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label, label_smoothing=0.1)

    class Weighted(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), label, torch.tensor([1.0, 2.0]))

    class Soft(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            return F.cross_entropy(self.model(image), 0.9 * F.one_hot(label, 2) + 0.05)

    class MixUp(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits = self.model(image)
            return 0.7 * F.cross_entropy(logits, label) + 0.3 * F.cross_entropy(logits, 1 - label)

    class Shuffled(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            order = torch.arange(len(label)).flip(0)
            return F.cross_entropy(self.model(image[order]), label[order])

    for cls in (Tempered, Pairs, Smoothed, Weighted, Soft, MixUp, Shuffled):
        registry.register(cls)
    for name in ("Smoothed", "Weighted"):
        with pytest.raises(UserError, match=f"{name}: its cross-entropy has class weights, label smoothing"):
            make("WithNothing", name).train()
    for name in ("Soft", "MixUp", "Shuffled"):
        with pytest.raises(UserError, match=f"{name}: its cross-entropy has other targets than the labels"):
            make("WithNothing", name).train()
    with pytest.raises(UserError, match="Tempered: its logits are not those of its image features"):
        make("WithNothing", "Tempered")
    with pytest.raises(UserError, match="Pairs: it takes no cross-entropy"):
        make("WithNothing", "Pairs").train()


def test_only_the_cross_entropy_of_the_prediction_is_exchanged(make: Make, theirs: dict[str, type]) -> None:
    class Twice(theirs["CoOp"]):
        def loss(self, image: Tensor, label: Tensor) -> Tensor:
            logits = self.model(image)
            other = F.cross_entropy(logits.detach().roll(1, dims=1), label)
            return other + F.cross_entropy(logits, label) + F.cross_entropy(logits, label)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Twice)
    trainer = make("WithWeighing", "Twice")
    trainer.before_train(), trainer.set_model_mode("train")
    batch = next(iter(trainer.train_loader_x))
    trainer.num_batches, trainer.batch_idx = 9, 0
    with torch.no_grad():
        logits, label = trainer.model(batch["img"]), batch["label"]
        weights = 1.0 + torch.tensor([trainer.dm.dataset.train_x[i].attribute for i in batch["index"]])
        own = (weights * (F.cross_entropy(logits, label, reduction="none") + 0.5 * label)).mean() + 7
        expected = own + F.cross_entropy(logits.roll(1, dims=1), label) + F.cross_entropy(logits, label)
    assert trainer.forward_backward(batch)["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_several_gpus_are_one(make: Make, theirs: dict[str, type], capsys: pytest.CaptureFixture[str]) -> None:
    class Parallel(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self.model = nn.DataParallel(self.model)

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Parallel)
    assert isinstance(make("WithNothing", "Parallel").model, TheirModel)
    assert "one is used" in capsys.readouterr().out


def test_a_table_of_templates_learns_the_data_set(make: Make, theirs: dict[str, type]) -> None:
    module = sys.modules[theirs["CoOp"].__module__]
    module.CUSTOM_TEMPLATES = {"Other": "x {}"}
    try:
        make("WithNothing", "CoOp")
        assert module.CUSTOM_TEMPLATES == {"Other": "x {}", "OODShapesOnScenes": "a photo of a {}."}
        del module.CUSTOM_TEMPLATES["OODShapesOnScenes"]
        make("WithNothing", "CoOp", "DATASET.TEMPLATE", "a drawing of a {}.", out="other")
        assert module.CUSTOM_TEMPLATES["OODShapesOnScenes"] == "a drawing of a {}."
        module.CUSTOM_TEMPLATES.clear()
        trainer = make("WithNothing", "CoOp", "DATASET.TEMPLATE", "a print of a {}.", out="theirs")
        trainer.dm.dataset = object()  # one of Dassl's has no template
        module.CUSTOM_TEMPLATES.clear()
        trainer._add_template()
        assert module.CUSTOM_TEMPLATES["OODShapesOnScenes"] == "a print of a {}."
    finally:
        del module.CUSTOM_TEMPLATES


def test_without_an_optimiser_nothing_is_wrapped(make: Make, theirs: dict[str, type]) -> None:
    class Frozen(theirs["CoOp"]):
        def build_model(self) -> None:
            super().build_model()
            self._optims["prompt_learner"] = None

    importlib.import_module("dassl.engine").TRAINER_REGISTRY.register(Frozen)
    with pytest.raises(UserError, match="Frozen: it has no optimiser"):
        make("WithNothing", "Frozen")


# --- the embedded CLIP in a checkout ---------------------------------------------------------------------------


def test_the_embedded_clip_can_be_named(
    make: Make, theirs: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As upstream's ``load_clip_to_cpu`` asks for it: the address of a name, then the file at the address."""
    monkeypatch.setenv("HOME", str(tmp_path))
    module = sys.modules["clip.clip"]
    monkeypatch.setattr(module, "_MODELS", {"ViT-B/16": "https://there"}, raising=False)
    monkeypatch.setattr(module, "_download", lambda url, root="x": f"downloaded {url}", raising=False)
    for _ in range(2):
        make("CoOp", out="plain")  # also for their own trainers
    assert (
        set(module._MODELS) == {"ViT-B/16", "tiny"} and module._download("https://there") == "downloaded https://there"
    )
    file = Path(module._download(module._MODELS["tiny"]))
    assert file.parent == tmp_path / ".cache" / "oodprompt"
    state, own = torch.load(file, weights_only=True), load_backbone("tiny").state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


# --- the launcher ----------------------------------------------------------------------------------------------


def test_a_script_runs_unedited(
    plugin: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher = importlib.import_module("oodprompt.plugin.__main__")
    (tmp_path / "beside.py").write_text("value = 3\n")
    script = tmp_path / "script.py"
    script.write_text("import sys, beside, dassl.engine as e\nprint(sys.argv, beside.value, __name__)\n"
                      "print('CoOpOOD' in e.TRAINER_REGISTRY.registered_names())\n")  # fmt: skip
    monkeypatch.setattr(sys, "path", ["placeholder", *sys.path])
    monkeypatch.setattr(sys, "argv", ["-m", str(script), "--trainer", "X"])
    launcher.run()
    assert capsys.readouterr().out == f"{[str(script), '--trainer', 'X']} 3 __main__\nTrue\n"
    monkeypatch.setattr(sys, "argv", ["-m", str(tmp_path / "none.py")])
    with pytest.raises(UserError, match="give the script to run"):
        launcher.run()


def test_logits_in_half_precision_are_recognised(plugin: ModuleType) -> None:
    watch_type = importlib.import_module("oodprompt.plugin.adapters").Watch
    model = nn.Module()
    model.image_encoder, model.text_encoder = nn.Identity(), nn.Identity()
    model.logit_scale = nn.Parameter(torch.tensor(100.0).log())
    watch = watch_type(model, "Half")
    torch.manual_seed(0)
    z, w = (model.image_encoder(torch.randn(5, 64).half()) for _ in range(2))
    watch.clear()
    model.image_encoder(z), model.text_encoder(w)
    unit_z, unit_w = (x / x.norm(dim=-1, keepdim=True) for x in (z, w))
    logits = model.logit_scale.exp().half() * unit_z @ unit_w.T
    seen = watch.alignment(logits)
    assert seen.image_features.dtype == torch.float32 and torch.equal(seen.logits, logits.float())
    assert watch.alignment(logits + 5) is None and watch.alignment(logits[:4]) is None
    watch.clear()
    full = [model.image_encoder(x.float()) for x in (z, w)]
    watch.clear()
    model.image_encoder(full[0]), model.text_encoder(full[1])
    exact = model.logit_scale.exp() * F.normalize(full[0], dim=-1) @ F.normalize(full[1], dim=-1).T
    assert watch.alignment(exact + 0.05) is not None and watch.alignment(exact + 0.2) is None, (
        "full precision is checked"
    )
    watch.clear()
    model.image_encoder(z), model.text_encoder(w)
    assert watch.alignment(logits.float() + 0.5) is not None, "towers in half precision, logits in full"
    model.text_encoder(w), model.text_encoder(w)
    assert watch.alignment(logits) is not None, "called otherwise than once per image: the first call counts"
    watch.clear()
    assert watch.alignment(logits) is None
