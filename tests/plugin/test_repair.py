"""What is broken in Dassl, and that it is mended once."""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from oodprompt import doctor
from oodprompt.engine.optim import learning_rate
from oodprompt.errors import UserError


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
