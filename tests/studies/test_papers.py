"""The scripts of papers: every number has a source, every grid resolves, trees are checked, tables stand beside the numbers."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oodprompt.errors import UserError
from oodprompt.studies.papers import main
from oodprompt.studies.published import OurRow, beside_published, over_targets, read_published
from tests.helpers.runs import REPOSITORY
from tests.helpers.trees.papers import TREES

FOLDER = REPOSITORY / "scripts" / "papers"
SETTINGS = yaml.safe_load((FOLDER / "settings.yaml").read_text())
COLUMNS = "dataset,method,backbone,worst_group,average,labels,ours,source,read_in,trust,remark"
ROW = "d,zero-shot,RN50,39.5,77.0,no / no,ZeroshotCLIP,A 2024,its table,P,"
SMALL = ["--opts", "OPTIM.MAX_EPOCH", "1", "INPUT.SIZE", "(48, 48)", "DATALOADER.NUM_WORKERS", "0"]
SMALL += ["TRAINER.JTT.FIRST_EPOCHS", "1", "TRAINER.AFR.FIRST_EPOCHS", "1"]


def script(dataset: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(FOLDER / f"{dataset}.sh"), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, cwd="/")


# --- published numbers -------------------------------------------------------------------------------------------


def test_every_published_number_has_a_source_and_names_methods_of_ours() -> None:
    rows = {dataset: read_published(FOLDER / "published.csv", dataset) for dataset in SETTINGS["datasets"]}
    assert sum(map(len, rows.values())) == len((FOLDER / "published.csv").read_text().splitlines()) - 1
    assert all(rows.values())
    known = {"", *SETTINGS["learners"], *SETTINGS["debiasers"]}
    assert {one.ours for of in rows.values() for one in of} <= known
    text = (FOLDER / "published.csv").read_text().lower()  # what is known from hearsay alone is not published
    assert [name for name in ("coopood", "logical-pt", "adapter", "wise-ft", "cfr") if name in text] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("A 2024", ""), "line 2: zero-shot has no source"),
        (("its table", " "), "line 2: zero-shot has no source"),
        ((",P,", ",M,"), "line 2: zero-shot has no source"),
        (("39.5", "about 40"), "line 2: .*must be accuracies in per cent"),
        (("39.5", ""), "line 2: .*must be accuracies in per cent"),
        (("A 2024", "A, 2024"), "line 2 has not 11 fields"),
        (("its table,P,", "its table"), "line 2 has not 11 fields"),
    ],
)
def test_numbers_without_a_source_are_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    file = tmp_path / "published.csv"
    file.write_text(f"{COLUMNS}\n{ROW}\n")
    assert read_published(file, "d")[0].worst_group == "39.5" and read_published(file, "other") == []
    file.write_text(f"{COLUMNS}\n{ROW.replace(*change)}\n")
    with pytest.raises(UserError, match=message):
        read_published(file, "other")


def test_columns_of_published_numbers_are_checked(tmp_path: Path) -> None:
    (tmp_path / "published.csv").write_text("dataset,method\nd,m\n")
    with pytest.raises(UserError, match="the columns must be dataset,method,backbone"):
        read_published(tmp_path / "published.csv", "d")


def test_the_page_counts_the_numbers_of_each_script() -> None:
    page = (REPOSITORY / "docs" / "papers.md").read_text()
    counts = dict(re.findall(r"`scripts/papers/(\w+)\.sh`\*\*.*? Its table has (\d+) published numbers", page))
    rows = {dataset: len(read_published(FOLDER / "published.csv", dataset)) for dataset in SETTINGS["datasets"]}
    assert {dataset: int(count) for dataset, count in counts.items()} == rows


# --- tables ------------------------------------------------------------------------------------------------------


def test_our_rows_stand_beside_the_numbers_of_the_same_method_and_backbone(tmp_path: Path) -> None:
    file = tmp_path / "published.csv"
    lines = [ROW, "d,GroupDRO,ImageNet RN50,91.4,,yes / yes,GroupDRO,B 2020,its table,S,whole network"]
    file.write_text("\n".join([COLUMNS, *lines]) + "\n")
    seeds = [
        {"worst_group_accuracy": worst, "accuracy": 0.9, "adjusted_average_accuracy": None} for worst in (0.25, 0.35)
    ]
    rows = [
        OurRow("ZeroshotCLIP", backbone, "no / no", "ZeroshotCLIP", seeds[:n])
        for backbone, n in (("RN50", 2), ("ViT-L/14", 0))
    ]
    rows.append(OurRow("GroupDRO-CoOp", "RN50", "yes / yes", "GroupDRO", seeds[:1]))
    text = beside_published(rows, read_published(file, "d"))
    table = [[cell.strip() for cell in line.split("|")[2:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert table[1:4] == [
        ["RN50", "no / no", "30.0 ± 7.1", "90.0 ± 0.0", "-", "2", "39.5 / 77.0 [1]", "-"],
        ["ViT-L/14", "no / no", "-", "-", "-", "-", "-", "-"],
        ["RN50", "yes / yes", "25.0", "90.0", "-", "1", "-", "91.4 / - [2]"],
    ]
    assert "its table, second-hand" in text and "A 2024" in text
    assert "We know none" in beside_published(rows, [])


def test_of_several_test_domains_the_worst_group_counts_and_averages_are_averaged() -> None:
    results = [
        {"worst_group_accuracy": worst, "accuracy": average, "adjusted_average_accuracy": None}
        for worst, average in ((0.5, 0.75), (0.25, 1.0))
    ]
    combined = over_targets(results)
    assert combined == {"worst_group_accuracy": 0.25, "accuracy": 0.875, "adjusted_average_accuracy": None}


def test_finished_runs_make_the_table_of_a_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PACS: four runs, one for each test domain, make a row; a seed that lacks one is not in it."""
    monkeypatch.setattr("oodprompt.runs.launch.changed_keys", lambda folder, arguments: [])
    TREES["pacs"](tmp_path)
    out = tmp_path / "out"
    domains = SETTINGS["datasets"]["pacs"]["targets"]
    for domain, worst in zip(domains, (0.9, 0.6, 0.8, 0.7), strict=True):
        folder = out / f"tiny_{domain}" / "ZeroshotCLIP" / "seed1"
        folder.mkdir(parents=True)
        content = {"dataset": "PACS", "backbone": "tiny", "split": "test", "accuracy": 0.95, "gap": 0.95 - worst}
        (folder / "results.json").write_text(json.dumps(content | {"worst_group_accuracy": worst}))
    words = [
        "pacs",
        str(tmp_path),
        "--backbones",
        "tiny",
        "--learners",
        "ZeroshotCLIP",
        "--debiasers",
        "--out",
        str(out),
    ]
    assert main(FOLDER, [*words, "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in (out / "published.md").read_text().splitlines() if "ZeroshotCLIP" in line)
    assert [cell.strip() for cell in row.split("|")[4:6]] == ["60.0", "95.0"]
    assert "ours: each domain is tested once" in printed and "75.5" in printed and "arXiv 2511.13005" in printed
    assert yaml.safe_load((out / "grid.yaml").read_text())["methods"] == {"ZeroshotCLIP": "--trainer ZeroshotCLIP"}
    shutil.rmtree(out / "tiny_photo")
    monkeypatch.setattr("oodprompt.runs.benchmark.run_here", lambda *_: ["it failed"])
    assert main(FOLDER, [*words, "--seeds", "1"]) == 1
    row = next(line for line in (out / "published.md").read_text().splitlines() if "ZeroshotCLIP" in line)
    assert [cell.strip() for cell in row.split("|")[4:8]] == ["-", "-", "-", "-"]


# --- grids -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", SETTINGS["datasets"])
def test_the_grid_of_every_script_resolves(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All methods on Waterbirds; on the others those with settings of their own, and one over each of two learners."""
    monkeypatch.chdir(tmp_path)  # files are found from everywhere
    own = {"CoOp", "MaPLe", "GroupDRO", *SETTINGS["datasets"][dataset]["methods"]}
    names = {
        kind: [name for name in SETTINGS[kind] if dataset == "waterbirds" or name in own]
        for kind in ("learners", "debiasers")
    }
    words = [word for kind, of in names.items() for word in (f"--{kind}", *of)]
    backbone = ["--backbones", "ViT-L/14"]
    assert (
        main(FOLDER, [dataset, "/data", *backbone, *words, "--seeds", "7", "--dry-run", "--opts", "OPTIM.LR", "0.5"])
        == 0
    )
    said, commands = [], []
    for line in capsys.readouterr().out.splitlines():
        (said if line.startswith("# ") else commands).append(line)
    wrapped = [name for name in names["debiasers"] if not SETTINGS["debiasers"][name].get("alone")]
    bases = [name for name in names["learners"] if not SETTINGS["learners"][name].get("alone")]
    rows = len(names["learners"]) + len(names["debiasers"]) + len(wrapped) * (len(bases) - 1)
    targets = SETTINGS["datasets"][dataset].get("targets", [""])
    assert len(commands) == rows * len(targets) and list(tmp_path.iterdir()) == []
    assert all(
        shlex.split(c)[-2:] == ["OPTIM.LR", "0.5"] and "/data" in c and f"datasets/{dataset}.yaml" in c
        for c in commands
    )
    folder = "ViT-L-14" + (f"_{targets[-1]}" if targets[-1] else "")
    one = next(c for c in commands if f"output/papers/{dataset}/{folder}/GroupDRO-MaPLe/seed7 " in c)
    assert one.index("--trainer MaPLe") < one.index("--trainer GroupDRO") < one.index("--base MaPLe")
    assert "vit_b16_c2_ep5_batch4_2ctx.yaml" in one and "OPTIM.MAX_EPOCH 5" in one
    assert all(any(f" {name}: " in line for line in said) for name in (*names["learners"], *names["debiasers"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["waterbirds", "/data", "--learners", "CoOpp"], "--learners: no settings for 'CoOpp': did you mean 'CoOp'"),
        (["waterbirds", "/data", "--debiasers", "JTT", "JTT"], "--debiasers: JTT is given twice"),
        (["waterbirds", "/data", "--learners", "ZeroshotCLIP"], "GroupDRO needs a learner that is trained"),
        (["waterbirds", "/data", "--learners", "--debiasers"], "give at least one of the two"),
        (["waterbirds", "/data", "--learners", "MaPLe"], "MaPLe prompts a ViT, not RN50"),
        (["waterbirds"], "required: DATA"),
        (["birds", "/data"], "invalid choice: 'birds'"),
    ],
)
def test_what_makes_no_sense_is_one_error(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(FOLDER, words)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and message in captured.err and captured.err.count("error") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", SETTINGS["datasets"])
def test_a_tree_that_is_not_there_is_one_error_ahead_of_all_runs(
    dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(FOLDER, [dataset, str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error: ") == 1 and "expected (ROOT is --root)" in captured.err and not captured.out
    assert not (tmp_path / "out").exists()


# --- scripts -----------------------------------------------------------------------------------------------------


def test_scripts_name_their_data_set_and_pass_the_rest_on(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\necho "$PYTHONPATH"\nexit 3\n')
    python.chmod(0o755)
    scripts = {path.stem for path in FOLDER.glob("*.sh")} - {"common"}
    assert scripts == set(SETTINGS["datasets"]) == set(TREES)
    for dataset in sorted(scripts):
        done = script(dataset, "/my data", "--seeds", 4, PYTHON=str(python), PYTHONPATH="")
        assert done.returncode == 3 and done.stderr == ""
        assert done.stdout.splitlines() == [
            str(FOLDER / "reproduce.py"),
            *(dataset, "/my data", "--seeds", "4"),
            str(REPOSITORY),
        ]


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dataset", SETTINGS["datasets"])
def test_script_on_a_miniature_of_the_published_layout(dataset: str, tmp_path: Path) -> None:
    """Every method for one epoch on the embedded CLIP (some on PACS' four domains); a second call trains nothing."""
    TREES[dataset](tmp_path / "data")
    some = ("OrthCal", "DFR", "GroupCoOp", "CoOpOOD-anchored+DebiasedPT")
    debiasers = [name for name in SETTINGS["debiasers"] if dataset != "pacs" or name in some]
    words = [tmp_path / "data", "--backbones", "tiny", "--seeds", 1, "--out", tmp_path / "out", "--together", "auto"]
    words += ["--debiasers", *debiasers]
    done = script(dataset, *words, *SMALL)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    text = (tmp_path / "out" / "published.md").read_text()
    assert text in done.stdout and done.stdout.count("Finished ") > 10
    ours = [line.split("|") for line in text.split("## Published")[0].splitlines() if line.startswith("| ")][1:]
    assert len(ours) == 2 + len(debiasers)
    assert all("tiny" in row[2] and row[4].strip() != "-" and row[7].strip() == "1" for row in ours)
    again = script(dataset, *words, *SMALL)
    assert again.returncode == 0 and "Training " not in again.stdout and text in again.stdout
