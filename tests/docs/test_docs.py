"""The documents say what the code does."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from oodprompt import cli
from oodprompt.config import extensions, keys
from oodprompt.config.extensions import register_all
from oodprompt.config.registry import DATASET_REGISTRY, TRAINER_REGISTRY
from oodprompt.engine.trainer import PromptTrainer
from tests.helpers.runs import REPOSITORY, load_script


def test_config_reference_is_current() -> None:
    module = load_script("scripts/maintain/config_reference.py")
    assert module.PATH.read_text() == module.reference(), "run python scripts/maintain/config_reference.py"


def test_files_named_in_the_readme_exist() -> None:
    text = (REPOSITORY / "README.md").read_text()
    named = set(re.findall(r"(?:scripts|configs|docs|datasets|trainers|oodprompt|tests|speed)/[\w./-]+\.\w+", text))
    assert named and [name for name in named if not (REPOSITORY / name).exists()] == []


def test_links_lead_somewhere() -> None:
    """Every relative link of every page, with its heading."""
    files = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    pages = {name: (REPOSITORY / name).read_text() for name in files or ["README.md"]}

    def headings(page: str) -> set[str]:
        found = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}

    broken = []
    for name, page in pages.items():
        for link in re.findall(r"\]\(([^)\s]+)\)", page):
            place, _, heading = link.partition("#")
            target = (REPOSITORY / name).parent / place if place else REPOSITORY / name
            if "://" in link:
                continue
            if not target.exists() or (heading and heading not in headings(target.read_text())):
                broken.append((name, link))
    assert broken == []


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What a test registers, declares and imports of its own files is forgotten after it."""
    for registry in (TRAINER_REGISTRY, DATASET_REGISTRY):
        monkeypatch.setattr(registry, "_objects", dict(registry._objects))
    monkeypatch.setattr(keys, "_KEYS", dict(keys._KEYS))
    monkeypatch.setattr(extensions, "_done", set(extensions._done))
    monkeypatch.setenv(extensions.ENVIRONMENT, "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def documented(page: str, heading: str, file: Path) -> str:
    """The code block of a section, written into ``file``; it is complete and under 60 lines."""
    section = (REPOSITORY / "docs" / page).read_text().split(f"\n## {heading}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    assert code.count("\n") < 60
    file.write_text(code)
    return str(file)


def test_method_of_the_documentation_goes_with_every_other(
    own: None, arguments: Callable[..., list[str]], tmp_path: Path
) -> None:
    learner = documented("your_method.md", "A prompt learner", tmp_path / "my_learner.py")
    debiaser = documented("your_method.md", "A debiaser", tmp_path / "my_debiaser.py")
    imports = ["--import", learner, "--import", debiaser]

    def results(name: str, *words: str) -> dict[str, Any]:
        cli.run([*imports, *arguments(*words[:1], name, *words[1:])])
        return json.loads((tmp_path / name / "results.json").read_text())

    both = results(
        "both", "RareFirst", "--base", "ResidualCoOp", "TRAINER.GROUPS", "true", "TRAINER.RAREFIRST.POWER", "0.5"
    )
    assert (both["trainer"], both["base"]) == ("RareFirst", "ResidualCoOp")
    state = torch.load(tmp_path / "both/residual_coop/model.pth.tar-3", weights_only=True)["state_dict"]
    assert {"ctx", "residual"} < set(state) and state["residual"].abs().max() > 0
    assert results("ours", "CoOpOOD", "--base", "ResidualCoOp")["base"] == "ResidualCoOp"
    assert results("stack", "CoOpOOD", "TRAINER.STACK", "('RareFirst',)")["stack"] == ["RareFirst"]


def test_debiaser_of_the_documentation_weighs_groups(
    own: None, build: Callable[..., PromptTrainer], tmp_path: Path
) -> None:
    extensions.add([documented("your_method.md", "A debiaser", tmp_path / "my_debiaser.py")])
    trainer = build("RareFirst", "TRAINER.GROUPS", "true")
    trainer.before_train()
    batch = next(iter(trainer.encoder.batches("train")))
    weight = trainer.debiasers[0].weight
    groups = torch.tensor([2 * d.label + d.attribute for d in trainer.dataset.train_x])
    assert weight.mean().item() == pytest.approx(1) and len(weight[groups == 1].unique()) == 1
    assert weight[groups == 0].sum().item() == pytest.approx(weight[groups == 1].sum().item())
    loss, _ = trainer.objective(trainer.encoder.align(batch), batch)
    assert loss != build("CoOp").objective(trainer.encoder.align(batch), batch)[0]


def test_data_of_the_documentation_are_read(own: None, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "your_data.md").read_text()
    table = re.search(r"```csv\n(.*?)```", text, re.DOTALL)[1]
    (tmp_path / "metadata.csv").write_text(table)
    rows = [line.split(",") for line in table.strip().split("\n")[1:]]
    (tmp_path / "photos").mkdir()
    for i, row in enumerate(rows):
        Image.new("RGB", (40, 40), (40 * i, 90, 30)).save(tmp_path / row[0])
    flags = ["--root", str(tmp_path), "--dataset-config-file", str(REPOSITORY / "configs/datasets/csv.yaml")]
    flags += ["--backbone", "tiny", "--output-dir", str(tmp_path / "out"), "DATALOADER.NUM_WORKERS", "0"]
    names = re.search(r"DATASET.ATTRIBUTE_NAMES \"(.*?)\" DATASET.ATTRIBUTE_PROMPTS \"(.*?)\"", text)
    keys = ["DATASET.ATTRIBUTE_NAMES", names[1], "DATASET.ATTRIBUTE_PROMPTS", names[2]]
    keys += ["OPTIM.MAX_EPOCH", "1", "INPUT.SIZE", "(48, 48)"]
    cli.run(["--trainer", "CoOpOOD", *flags, "TRAINER.COOPOOD.ANCHOR", "attributes", *keys])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [g["attribute"] for g in results["groups"] if g["num_samples"]] == ["beach", "meadow"]

    for i, (split, place, classname) in enumerate(
        itertools.product(("train", "val", "test"), *(("beach", "meadow"), ("cow", "horse")))
    ):
        file = tmp_path / "cows" / split / place / f"{classname}-{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (20 * i, 90, 30)).save(file)
    line = [
        "--import",
        documented("your_data.md", "5. A data set in code", tmp_path / "my_data.py"),
        "--trainer",
        "ZeroshotCLIP",
        *flags,
    ]
    line[line.index(str(tmp_path / "out"))] = str(tmp_path / "cows_out")
    cli.run([*line, "DATASET.NAME", "Cows", "INPUT.SIZE", "(48, 48)"])
    results = json.loads((tmp_path / "cows_out" / "results.json").read_text())
    assert results["dataset"] == "Cows" and [g["num_samples"] for g in results["groups"]] == [1, 1, 1, 1]


def test_every_debiaser_is_documented() -> None:
    text = (REPOSITORY / "docs" / "debiasers.md").read_text() + (REPOSITORY / "README.md").read_text()
    register_all()
    names = [name for name, trainer in TRAINER_REGISTRY.items() if trainer.debiaser_class]
    assert len(names) > 8 and [name for name in names if f"`{name}`" not in text] == []
