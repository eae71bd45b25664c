"""The doctor: what it finds, what it says to do, and when a run is possible."""

from __future__ import annotations

import hashlib
import importlib.machinery
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import oodprompt.backbones
from oodprompt import doctor
from oodprompt.backbones import weights as weights_module
from tests.helpers.runs import REPOSITORY

DASSL = REPOSITORY / "tests" / "plugin" / "stand_in" / "dassl"


def test_report_and_exit_status(capsys: pytest.CaptureFixture[str], data_root: Path) -> None:
    began = time.monotonic()
    assert doctor.main(["--root", str(data_root)]) == 0
    assert time.monotonic() - began < 60, "it is made to take less than 10 s on an idle machine"
    out = capsys.readouterr().out
    for part in (
        f"torch {torch.__version__.split('+')[0]}",
        "CPU: ",
        "tiny, tiny-photo: come with the package",
        "GiB free",
    ):
        assert part in out
    assert (
        "ShapesOnScenes: renders itself" in out and "the embedded CLIP runs on" in out and "A run is possible." in out
    )


def test_a_broken_installation_is_no_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("no kernel image\nmore")

    monkeypatch.setattr(oodprompt.backbones, "load_backbone", broken)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "No run is possible. What is wrong:" in out and "RuntimeError: no kernel image)" in out and "more" not in out


def test_features_that_are_not_finite_are_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = oodprompt.backbones.load_backbone("tiny")
    clip.visual.proj.data[0] = torch.nan
    monkeypatch.setattr(oodprompt.backbones, "load_backbone", lambda name: clip)
    assert "computes wrongly" in doctor.trial()[1][0]


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PACKAGES", ("torch", "no-such-package"))
    lines, problems = doctor.versions()
    assert "no-such-package: not installed" in lines and len(problems) == 1 and "pip install -e ." in problems[0]


@pytest.fixture
def dassl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Dassl that is found, in a folder of its own, without gdown, wilds and pandas."""
    folder = Path(shutil.copytree(DASSL, tmp_path / "site" / "dassl"))
    spec = importlib.machinery.ModuleSpec("dassl", None, origin=str(folder / "__init__.py"))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", {"dassl": spec}.get)
    return folder


def test_dassl_and_what_is_broken_in_it(dassl: Path) -> None:
    lines, problems = doctor.dassl()
    assert lines[0] == f"0.6.3 in {dassl}" and "oodprompt.plugin" in lines[-1] and problems == []
    assert set(doctor.dassl_breakages(dassl)) == set(doctor.BREAKAGES) and len(lines) == 2 + len(doctor.BREAKAGES)


def test_a_mended_dassl_has_nothing_broken(dassl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {
        "optim/lr_scheduler.py": ("super().__init__(optimizer, last_epoch, verbose)", "super().__init__(optimizer)"),
        "utils/torchtools.py": ("torch.load(fpath,", "torch.load(fpath, weights_only=False,"),
        "data/transforms/randaugment.py": ("np.int", "int"),
        "data/transforms/autoaugment.py": ("np.int", "int"),
        "data/datasets/base_dataset.py": ("import gdown", ""),
    }
    for file, (old, new) in changes.items():
        text = (dassl / file).read_text()
        assert old in text
        left = set(doctor.dassl_breakages(dassl))
        (dassl / file).write_text(text.replace(old, new))
        assert len(left - set(doctor.dassl_breakages(dassl))) == (0 if "randaugment" in file else 1), file
    assert set(doctor.dassl_breakages(dassl)) == {"wilds"}
    monkeypatch.setattr(doctor, "_lacks", lambda package: package == "pandas")
    assert set(doctor.dassl_breakages(dassl)) == {"wilds"}
    monkeypatch.setattr(doctor, "_lacks", lambda package: False)
    assert doctor.dassl()[0] == [f"0.6.3 in {dassl}"]


def test_what_is_broken_depends_on_what_is_installed(dassl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        def __init__(self, optimizer, last_epoch=-1, verbose=False): ...

    monkeypatch.setattr(torch.optim.lr_scheduler, "LRScheduler", Old)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.5.1"))
    monkeypatch.setattr(np, "int", int, raising=False)
    assert set(doctor.dassl_breakages(dassl)) == {"wilds", "gdown"}


def test_without_dassl_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    lines, problems = doctor.dassl()
    assert "not found" in lines[0] and problems == []


def test_weights_are_checked_and_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"weights"
    known = {
        "A": (hashlib.sha256(content).hexdigest(), "a.pt"),
        "B": ("0" * 64, "b.pt"),
        "C": ("1" * 64, "c.pt"),
    }
    monkeypatch.setattr(weights_module, "OPENAI_WEIGHTS", known)
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("it downloads"))
    for file in ("a.pt", "b.pt"):
        (tmp_path / file).write_bytes(content)
    lines, problems = doctor.weights(tmp_path)
    assert f"A: {tmp_path / 'a.pt'}, SHA256 right" in lines and f"B: {tmp_path / 'b.pt'}, damaged" in lines
    assert lines[-1].endswith("downloaded at first use: C")
    assert len(problems) == 1 and "delete it" in problems[0] and "b.pt" in problems[0]
    lines, problems = doctor.weights(tmp_path, seconds=0)
    assert "not checked for lack of time" in lines[1] and problems == []


def test_data_sets_that_would_load(tmp_path: Path) -> None:
    images = tmp_path / "mine"
    images.mkdir()
    Image.new("RGB", (4, 4)).save(images / "x.png")
    rows = [f"mine/x.png,{label},{split}" for label in ("cat", "dog") for split in ("train", "train", "val", "test")]
    (tmp_path / "metadata.csv").write_text("image,label,split\n" + "\n".join(rows) + "\n")
    (tmp_path / "waterbirds").mkdir()
    for name in ("PACS", "celeba"):
        (tmp_path / name).mkdir()
    lines, problems = doctor.data_sets(str(tmp_path))
    assert "CSV: 4 / 2 / 2 images to train, validate, test; 2 classes" in lines
    assert "Waterbirds: waterbirds is there, but would not load" in lines
    assert {problem.split(":")[0] for problem in problems} == {"Waterbirds", "PACS", "CelebA"}
    assert "CSV: all 1 images looked at" in lines
    assert f"CSV: 1 of 1 images (100.0%) show one constant colour: {images / 'x.png'}" in lines
    assert "OxfordPets" in lines[-1] and "CSV" not in lines[-1] and "MetaShift" in lines[-1]
    lines, problems = doctor.data_sets(str(tmp_path), seconds=0)
    assert "CSV: metadata.csv is there; not read to the end for lack of time" in lines and problems == []
    assert "there is no folder" in doctor.data_sets(str(tmp_path / "none"))[1][0]
    assert "give --root" in doctor.data_sets("")[0][-1]


def test_a_slow_section_is_cut_short() -> None:
    began = time.monotonic()
    with pytest.raises(doctor._TimeUp), doctor._at_most(0.05):
        time.sleep(20)
    assert time.monotonic() - began < 10
    with doctor._at_most(0.05):
        pass
    time.sleep(0.1)  # the alarm does not ring afterwards


def test_storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    lines, _ = doctor.storage()
    assert len(lines) == 3 and f"working folder: {tmp_path}, writable" in lines[2]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert len(doctor.storage()[1]) == 3 and "not writable" in doctor.storage()[0][0]
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: True)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("U", (), {"free": 2**30}))
    assert all("free some space" in problem for problem in doctor.storage()[1]) and len(doctor.storage()[1]) == 3
