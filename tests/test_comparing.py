"""``oodprompt compare``: several runs on one page."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from oodprompt import comparing
from oodprompt.errors import UserError
from oodprompt.reports.comparison_page import chart
from tests.helpers.html_tree import Tree
from tests.helpers.runs import Run


def made_up(folder: Path, accuracy: float, worst: float | None = 0.5, losses: Any = (1.0, 0.5), **keys: Any) -> Path:
    """A finished run with two groups, as far as a comparison looks at it."""
    groups = [
        {"class": "<b>owl</b>", "attribute": a, "num_samples": 10, "num_train": 90, "accuracy": p}
        for a, p in (("day", accuracy), ("night", worst))
        if worst is not None
    ]
    results = {
        **{"trainer": keys.get("trainer", "CoOp"), "base": "CoOp", "stack": [], "dataset": "Owls", "backbone": "tiny"},
        **{"seed": 1, "split": "test", "num_samples": 20, "accuracy": accuracy, "worst_group_accuracy": worst},
        **{"gap": None if worst is None else accuracy - worst, "adjusted_average_accuracy": None, "macro_f1": 0.5},
        **{"groups": groups, "classes": [{"class": "owl", "num_samples": 20, "accuracy": accuracy}]},
        "time": {"train_s": 30.0},
    }
    (folder / "prompts").mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    tree = {"OPTIM": {"LR": keys.get("lr", 0.1)}, "DATASET": {"ROOT": str(folder)}, "SEED": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    history = [{"epoch": i + 1, "loss": loss, "val_accuracy": 0.8} for i, loss in enumerate(losses)]
    state = {"state_dict": {"x": torch.zeros(1)}, "oodprompt": {"history": history}}
    torch.save(state, folder / "prompts" / "model.pth.tar-2")
    (folder / "prompts" / "checkpoint").write_text("model.pth.tar-2\n")
    return folder


@pytest.fixture
def page(tmp_path: Path) -> str:
    made_up(tmp_path / "runs" / "a", 0.75)
    made_up(tmp_path / "runs" / "b ü", 0.9, 0.6, lr=0.2, trainer="CoOpOOD")
    comparing.compare([tmp_path / "runs"], tmp_path / "out")
    return (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_runs_its_own_script_alone(page: str) -> None:
    tree = Tree(page.replace("=>", "").replace(" < ", ""))
    script = re.search(r"<script>(.*)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(m["content"] for m in tree.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and f"script-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?:|url\(|@import|<iframe", page) and page.count("<script") == 1
    assert "prefers-color-scheme: dark" in page and "<b>owl</b>" not in page
    addresses = [a["href"] for a in tree.all("a")]
    assert "../runs/a/" in addresses and "../runs/b%20%C3%BC/config.yaml" in addresses


def test_the_page_shows_runs_groups_curves_and_settings(page: str) -> None:
    text = " ".join(Tree(page.replace("=>", "").replace(" < ", "")).text.split())
    assert "CoOpOOD over CoOp" in text and re.search("OPTIM.LR ?1 0.1 ?2 0.2", text) and "ROOT" not in text
    assert re.search(r'data-name="worst group" data-value="0.6" class="best">60.0<', page)
    assert re.search(r'data-name="worst group" data-value="0.5">50.0<', page)
    assert "owl</b> / night" not in page and re.search("/ night ?10 images, 90 in training ?1 50.0 ?2 60.0", text)
    assert page.count("<polyline") == 4 and "last values: run 1 0.5, run 2 0.5" in page


def test_values_of_a_curve_stand_where_the_axis_says() -> None:
    drawn = chart({"title": "loss", "percent": False, "lines": [{"number": 1, "points": [(1, 1.0), (3, 2.0)]}]})
    assert drawn["lines"][0]["points"] == "44.0,168.0 352.0,10.0" and drawn["levels"][0] == ("1", "168.0")
    steep = [(1, 100.0), (2, 1.0), (3, 0.01), (4, float("nan"))]
    drawn = chart({"title": "loss", "percent": False, "lines": [{"number": 1, "points": steep}]})
    assert drawn["lines"][0]["points"] == "44.0,10.0 198.0,89.0 352.0,168.0" and drawn["title"] == "loss, logarithmic"
    drawn = chart({"title": "accuracy", "percent": True, "lines": [{"number": 1, "points": [(1, 2.0), (2, 90.0)]}]})
    assert drawn["title"] == "accuracy" and [level for level, _ in drawn["levels"]] == ["0", "22.5", "45", "67.5", "90"]


def test_tables_and_picture_say_the_same(tmp_path: Path) -> None:
    made_up(tmp_path / "a", 0.75)
    made_up(tmp_path / "b", 0.9, None, losses=())
    found = comparing.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert [file.name for file in found.files] == ["comparison.html", "comparison.md", "comparison.png"]
    assert (tmp_path / "out" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    text = re.sub(" +", " ", (tmp_path / "out" / "comparison.md").read_text())
    assert "| 1 | CoOp | a | 1 | 50.0 % | 75.0 % | 25.0 % | - |" in text and "All runs have the same settings." in text
    assert "| <b>owl</b> / night | 10 | 50.0 % | - |" in text and "No training curve is found for run 2." in text
    assert list(found.table["accuracy"]) == [0.75, 0.9] and list(found.table.index) == [1, 2]
    assert "75.0 %" in str(found) and "0.75" in found._repr_html_()


def test_what_is_no_run_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "empty").mkdir()
    for folder, message in (("nothing", "there is no folder"), ("empty", "has no finished run")):
        with pytest.raises(UserError, match=message):
            comparing.compare([tmp_path / folder])
    made_up(tmp_path / "all" / "one", 0.5)
    (tmp_path / "all" / "killed").mkdir()
    (tmp_path / "all" / "killed" / "config.yaml").write_text("SEED: 1\n")
    assert len(comparing.compare(tmp_path / "all").content["runs"]) == 1
    assert f"Note: {tmp_path / 'all' / 'killed'} has no whole results.json and is left out" in caplog.text


def test_real_runs_are_compared_by_the_command(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run("CoOp", "one"), run("ZeroshotCLIP", "two")
    runs = [str(tmp_path / name) for name in ("one", "two")]
    capsys.readouterr()
    assert comparing.main([*runs, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for results in (first, second):
        assert f"{100 * results['worst_group_accuracy']:.1f} %" in said
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert "TRAINER.NAME" in page and page.count("<polyline") >= 2
