"""What the import of the plugin registers, its keys and data sets, and the launcher."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from yacs.config import CfgNode

from oodprompt.backbones import load_backbone
from oodprompt.backbones.weights import EMBEDDED
from oodprompt.engine import TRAINER_REGISTRY, PromptTrainer
from oodprompt.errors import UserError
from tests.helpers.foreign import CLASSES, Make, Nothing
from tests.helpers.forks import Forks
from tests.helpers.runs import REPOSITORY


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
    assert cfg.TRAINER.COOPOOD.ALPHA == 7.0 and cfg.TRAINER.COOPOOD.BETA == 0.3 and cfg.TRAINER.NAME == "x"
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


def test_an_imported_file_is_registered_with_dassl(tmp_path: Path, forks: Forks) -> None:
    page = (REPOSITORY / "docs" / "your_method.md").read_text().split("## A debiaser")[1]
    (tmp_path / "my_debiaser.py").write_text(page.split("```python\n")[1].split("```")[0])
    stand_in = REPOSITORY / "tests" / "plugin" / "stand_in"
    (tmp_path / "program.py").write_text(
        f"import sys\nsys.path.insert(0, {str(stand_in)!r})\n"
        "import oodprompt.plugin, dassl.engine as e, dassl.config as c\n"
        "print('RareFirst' in e.TRAINER_REGISTRY.registered_names(), c.get_cfg_default().TRAINER.RAREFIRST.POWER)\n"
        "print('GroupDRO' in e.TRAINER_REGISTRY.registered_names())"
    )
    shown = forks.run([str(tmp_path / "program.py")], tmp_path, {"OODPROMPT_IMPORT": "my_debiaser.py"})
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
    cfg.DATASET.ATTRIBUTE_NAMES = ("auto",)  # proposed by the audit, not the data set's
    assert TheirDataset(cfg, DatasetBase(train_x=images, test=images)).attribute_names == ()


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


def test_an_empty_base_is_coop_of_the_checkout(make: Make, theirs: dict[str, type]) -> None:
    trainer = make("CoOpOOD")
    assert theirs["CoOp"] in type(trainer).__mro__
    assert trainer.model.prompt_learner.training, "modes are left as they were built"


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


def test_the_embedded_clips_can_be_named(
    make: Make, theirs: dict[str, type], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As upstream's ``load_clip_to_cpu`` asks for it: the address of a name, then the file at the address."""
    monkeypatch.setenv("HOME", str(tmp_path))
    module = sys.modules["clip.clip"]
    monkeypatch.setattr(module, "_MODELS", {"ViT-B/16": "https://there"}, raising=False)
    monkeypatch.setattr(module, "_download", lambda url, root="x": f"downloaded {url}", raising=False)
    for _ in range(2):
        make("CoOp", out="plain")  # also for their own trainers
    assert set(module._MODELS) == {"ViT-B/16", *EMBEDDED}
    assert module._download("https://there") == "downloaded https://there"
    for name in EMBEDDED:
        file = Path(module._download(module._MODELS[name]))
        assert file.parent == tmp_path / ".cache" / "oodprompt"
        state, own = torch.load(file, weights_only=True), load_backbone(name).state_dict()
        assert state.keys() == own.keys() and all(torch.equal(state[key], own[key]) for key in own)


@pytest.mark.parametrize("name", ["open_clip:ViT-B-16/laion2b_s34b_b88k", "hf:openai/clip-vit-base-patch16"])
def test_names_that_a_checkout_cannot_load_end_with_one_line(
    name: str, make: Make, theirs: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As upstream's ``load_clip_to_cpu`` asks for the address, in the trainer of the checkout and in a debiaser over it."""
    module = sys.modules["clip.clip"]
    monkeypatch.setattr(module, "_MODELS", {"ViT-B/16": "https://there"}, raising=False)
    monkeypatch.setattr(module, "_download", lambda url: url, raising=False)
    build = theirs["CoOp"].build_model
    monkeypatch.setattr(
        theirs["CoOp"], "build_model", lambda self: (module._MODELS[self.cfg.MODEL.BACKBONE.NAME], build(self))
    )
    for trainer in ("CoOp", "CoOpOOD"):
        with pytest.raises(UserError, match=rf"NAME {name}: .* python -m oodprompt train --backbone {name}") as error:
            make(trainer, "", "MODEL.BACKBONE.NAME", name)
        assert "\n" not in str(error.value)
        make(trainer, "", "MODEL.BACKBONE.NAME", "ViT-B/16")
        with pytest.raises(KeyError, match="ViT-B/17"):
            make(trainer, "", "MODEL.BACKBONE.NAME", "ViT-B/17")


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
