"""Checkpoints: ours, Dassl's, damaged and malicious ones; and files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from oodprompt.backbones.tensors import Ignored
from oodprompt.engine import checkpoint
from oodprompt.errors import UserError
from oodprompt.files import write_atomically


class WarmupAroundCosine:
    """Stands for what Dassl pickles: an object of a class, which holds torch's scheduler with its optimiser."""

    def __init__(self) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
        weight.sum().backward()
        optimizer.step()
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10.0)
        self.steps = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])


def test_round_trip_is_weights_only(tmp_path: Path) -> None:
    module = nn.Linear(2, 3)
    state = {"state_dict": module.state_dict(), "epoch": 4, "val_result": None, "oodprompt": {"history": [{"lr": 0.1}]}}
    path = checkpoint.file_of(tmp_path, "prompt_learner", 4)
    checkpoint.save(state, path)
    assert path == tmp_path / "prompt_learner" / "model.pth.tar-4"
    assert checkpoint.file_of(tmp_path, "m", None).name == "model-best.pth.tar"
    torch.load(path, weights_only=True)
    loaded = checkpoint.load(path)
    other = nn.Linear(2, 3)
    checkpoint.load_weights(other, loaded["state_dict"], path)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), module.parameters(), strict=True))
    assert {k: v for k, v in loaded.items() if k != "state_dict"} == {
        k: v for k, v in state.items() if k != "state_dict"
    }


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_dassls_files_load_with_their_classes_left_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, dtype: torch.dtype
) -> None:
    state = {
        "state_dict": {"ctx": torch.arange(6).view(2, 3).to(dtype).T, "token_prefix": nn.Parameter(torch.ones(1))},
        "epoch": 50,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(0.002), "betas": (0.9, 0.99)}]},
        "scheduler": {"successor": WarmupAroundCosine(), "last_epoch": 1},
        "val_result": np.float32(71.5),
    }
    torch.save(state, tmp_path / "model", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(WarmupAroundCosine, "__setstate__", lambda *_: pytest.fail("foreign code ran"), raising=False)
    loaded = checkpoint.load(tmp_path / "model")
    assert torch.equal(loaded["state_dict"]["ctx"], state["state_dict"]["ctx"])
    assert loaded["state_dict"]["ctx"].dtype == dtype
    assert loaded["epoch"] == 50
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.99)
    assert isinstance(loaded["scheduler"]["successor"], Ignored)
    assert isinstance(loaded["val_result"], Ignored)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("call", [(os.system, "touch"), (eval, "__import__('pathlib').Path('{}').touch()#")])
def test_malicious_files_run_nothing(tmp_path: Path, zipped: bool, call: tuple) -> None:
    trap = tmp_path / "trap"
    function, text = call

    class Malicious:
        def __reduce__(self) -> tuple:
            return function, (text.format(trap) if "{}" in text else f"{text} {trap}",)

    torch.save(
        {"state_dict": {"ctx": torch.ones(1)}, "x": Malicious()}, tmp_path / "m", _use_new_zipfile_serialization=zipped
    )
    assert checkpoint.load(tmp_path / "m")["state_dict"] == {"ctx": torch.ones(1)}
    torch.save(Malicious(), tmp_path / "m", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="no dict 'state_dict'"):
        checkpoint.load(tmp_path / "m")
    assert not trap.exists()


@pytest.mark.parametrize("content", [b"", b"hello world", b"PK\x03\x04junk", b"\x80\x02.", "truncated"])
def test_damaged_files_are_named(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "model.pth.tar-1"
    checkpoint.save({"state_dict": {"ctx": torch.ones(100)}}, path)
    path.write_bytes(path.read_bytes()[:-200] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=f"cannot read the checkpoint {path}: ") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("state", [[1], torch.ones(1), {"ctx": torch.ones(1)}, {"state_dict": torch.ones(1)}])
def test_other_files_are_no_checkpoints(tmp_path: Path, state: object) -> None:
    torch.save(state, tmp_path / "m")
    with pytest.raises(UserError, match="is no checkpoint: it has no dict 'state_dict'"):
        checkpoint.load(tmp_path / "m")


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    checkpoint.save({"state_dict": {}}, tmp_path / "model.pth.tar-3")
    with pytest.raises(UserError, match=r"no model at .*tar-4; .* has model\.pth\.tar-3: check .*--load-epoch"):
        checkpoint.load(tmp_path / "model.pth.tar-4")
    with pytest.raises(UserError, match=f"there is no checkpoint in {tmp_path / 'gone'}"):
        checkpoint.load(tmp_path / "gone" / "model.pth.tar-4")


def test_weights_that_do_not_fit_change_nothing() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    given = {key: torch.zeros_like(value) for key, value in before.items()}
    given["0.weight"] = torch.zeros(5, 2)
    given["1.weight"] = "no tensor"
    given["meta_net.bias"] = given.pop("1.bias")
    with pytest.raises(UserError) as error:
        checkpoint.load_weights(module, given, Path("here/model"))
    for words in (
        "here/model does not fit the model",
        "0.weight has shape (5, 2), the model (3, 2)",
        "1.weight has shape of str",
        "1.bias is missing",
        "meta_net.bias is unknown",
    ):
        assert words in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_skipped_keys_stay_as_they_are() -> None:
    module, given = nn.Linear(2, 3), {"weight": torch.zeros(3, 2), "bias": torch.zeros(7)}
    bias = module.bias.clone()
    checkpoint.load_weights(module, given, Path("m"), skip=("bias",))
    assert torch.equal(module.bias, bias)
    assert not module.weight.any()
    del given["bias"]
    checkpoint.load_weights(module, given, Path("m"), skip=("bias",))
    half = {"weight": torch.ones(3, 2).half(), "bias": torch.ones(3).half()}
    checkpoint.load_weights(module, half, Path("m"))
    assert module.weight.dtype == torch.float32
    assert module.weight.eq(1).all()


def test_newest_epoch_is_the_newest_that_all_models_have(tmp_path: Path) -> None:
    names = ["prompt_learner", "debiaser"]
    assert checkpoint.newest_epoch(tmp_path, names) is None
    checkpoint.write_pointer(checkpoint.file_of(tmp_path, "prompt_learner", 10))
    assert checkpoint.newest_epoch(tmp_path, names) is None
    checkpoint.write_pointer(checkpoint.file_of(tmp_path, "debiaser", 9))
    assert checkpoint.newest_epoch(tmp_path, names) == 9
    assert (tmp_path / "debiaser" / "checkpoint").read_text() == "model.pth.tar-9\n"
    assert checkpoint.newest_epoch(tmp_path, []) is None
    (tmp_path / "debiaser" / "checkpoint").write_text("model-best.pth.tar")
    with pytest.raises(UserError, match="names 'model-best.pth.tar'.*delete it"):
        checkpoint.newest_epoch(tmp_path, names)


# --- files -----------------------------------------------------------------------------------------------------


def test_written_files_are_whole_and_readable(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.txt"
    write_atomically(path, "é")
    write_atomically(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["a.txt"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, failure: BaseException
) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises((UserError, KeyboardInterrupt)) as error:
            write_atomically(path, "new")
    if isinstance(failure, OSError):
        assert str(error.value).startswith(f"cannot write {path}: No space left on device; ")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "a.txt", tmp_path / "folder"):
        with pytest.raises(UserError, match=f"cannot write {path}: .*--output-dir"):
            write_atomically(path, "new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
