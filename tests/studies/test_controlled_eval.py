"""The grid of the controlled evaluation: settings, validity, discovery beside its baselines, mitigation, one table."""

from __future__ import annotations

import io
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oodprompt.errors import UserError
from oodprompt.runs.launch import RunsFailed
from oodprompt.studies import controlled
from oodprompt.studies.controlled import run
from oodprompt.studies.controlled_tables import discovery_table, mitigation_table
from oodprompt.studies.evaluation import METHODS, Plan
from oodprompt.studies.part import MEASURED, Part, part_of
from tests.helpers.coco import coco
from tests.helpers.digits import put_items


@pytest.fixture(scope="module")
def idx_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of MNIST's form with a few items of each class."""
    folder = tmp_path_factory.mktemp("digits")
    put_items(folder, {"train": 12, "t10k": 12})
    return folder


def model(eps: tuple[float, float], worst: float, **precision: float) -> dict[str, Any]:
    keys = ("image_worst_group", "image_overall", "region_worst_group", "region_overall")
    return {"eps": list(eps), "precision": precision, "found": True, "attribute": "nine"} | dict.fromkeys(keys, worst)


def test_tables_average_over_seeds_then_settings() -> None:
    one, two, seeds = ("nine", 0.9), ("two", 0.9), [1, 2]
    models = {
        (one, 1): model((0.5, 0.5), 0.2, RaVL=1.0, Random=0.2),
        (one, 2): model((0.3, 0.25), 0.3, RaVL=0.8, Random=0.0),
        (two, 1): model((0.2, 0.9), 0.1, RaVL=0.5, Random=0.1),
        (two, 2): model((0.15, 0.9), 0.1, RaVL=0.5, Random=0.1),
    }
    table = discovery_table([one, two], models, seeds)
    mean, deviation = statistics.fmean([0.9, 0.5]), statistics.stdev([0.9, 0.5])
    row = next(line for line in table.splitlines() if "RaVL" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == [f"{mean:.2f} ± {deviation:.2f}", "0.90", "-", "-"]  # above 10, 20, 30 and 40 points
    rows = {"standard": [models[one, 1], models[two, 1]], "RaVL": [model((0, 0), 0.6), model((0, 0), 0.3)]}
    row = next(line for line in mitigation_table(rows).splitlines() if "RaVL" in line)
    gain = f"{statistics.fmean([40, 20]):.1f} ± {statistics.stdev([40, 20]):.1f}"
    assert [cell.strip() for cell in row.split("|")[2:-1]][-1] == gain


@pytest.mark.usefixtures("few_mixtures", "undrawn")
def test_grid_runs_and_goes_on_where_it_was(
    idx_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--root", str(idx_root), "--out", str(tmp_path), "--targets", "nine", "--seeds", "1", "--train", "120"]
    words += ["--evaluation", "40", "--jobs", "1", "OPTIM.MAX_EPOCH", "1"]
    monkeypatch.setattr(controlled, "is_valid", lambda eps, tau=0.1: True)  # so short a training learns nothing
    run(words)
    results = json.loads((tmp_path / "results.json").read_text())
    (standard,) = results["models"]
    assert standard["target"] == "nine" and set(standard["precision"]) > {"RaVL", "Random", "George (prediction image)"}
    assert 0 <= standard["image_worst_group"] <= standard["image_overall"] <= 1
    printed = capfd.readouterr().out
    assert "Training standard, nine, V 0.95, seed 1 (1 of 1)" in printed
    folder = tmp_path / "runs" / "mnist-nine-v0.95" / "standard" / "seed1"
    times = [(folder / name).stat().st_mtime_ns for name in (MEASURED, "results.json")]
    run(words)
    assert [(folder / name).stat().st_mtime_ns for name in (MEASURED, "results.json")] == times
    capfd.readouterr()
    (folder / MEASURED).write_text("{")
    run(words)
    assert (folder / "results.json").stat().st_mtime_ns == times[1], "measured again, not trained"
    assert json.loads((folder / MEASURED).read_text())["precision"] == standard["precision"]
    assert (tmp_path / "table.md").read_text() in capfd.readouterr().out
    with pytest.raises(UserError, match="run of another grid .OPTIM.LR was 0.001, is now 0.5"):
        run([*words, "OPTIM.LR", "0.5"])


def test_mitigations_start_from_models_in_which_discovery_found_something(
    idx_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = tmp_path / "fails"
    fails.touch()

    def work(part: Part) -> int:
        if part.method == "RaVL" and fails.exists():
            print("error: no room")
            return 2
        assert (part.found is None) == (part.method == "standard")
        measured = model((0.5, 0.5), 0.25 if part.method == "standard" else 0.75, RaVL=1.0, Random=0.2)
        measured |= {"found": part.seed == 1, "from": str(part.found)}
        (part.folder / MEASURED).write_text(json.dumps(measured))
        return 0

    monkeypatch.setattr(Part, "work", work)
    monkeypatch.setattr(controlled, "teach_backbone", lambda name, kind, file: file)
    monkeypatch.setattr("oodprompt.runs.launch.changed_keys", lambda folder, arguments: [])
    words = ["--root", str(idx_root), "--out", str(tmp_path), "--targets", "nine", "two", "--seeds", "1", "2"]
    words += ["--train", "120", "--evaluation", "40", "--methods", "RaVL", "upsampled", "--jobs", "2"]
    with pytest.raises(RunsFailed, match="2 of 4 runs failed; rerun"):
        run(words)
    assert capsys.readouterr().err.count("RaVL/seed1: error: no room") == 2 and not (tmp_path / "table.md").exists()
    fails.unlink()
    run(words)
    rows = json.loads((tmp_path / "results.json").read_text())["mitigations"]
    assert [(row["target"], row["seed"], row["method"]) for row in rows] == [
        *(("nine", 1, "RaVL"), ("nine", 1, "upsampled"), ("two", 1, "RaVL"), ("two", 1, "upsampled"))
    ]
    assert [row["from"] for row in rows] == [
        str(tmp_path / "runs" / f"mnist-{target}-v0.95" / "standard" / "seed1")
        for target in ("nine",) * 2 + ("two",) * 2
    ]
    line = next(line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("| upsampled"))
    assert line.split("|")[2].strip() == "75.0 ± 0.0" and line.split("|")[-2].strip() == "50.0 ± 0.0"
    assert (tmp_path / "settings.png").stat().st_size > 5000


@pytest.mark.usefixtures("few_mixtures", "undrawn")
def test_settings_of_coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, rng = [], np.random.default_rng(0)
    for _ in range(8):
        image = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((640, 480))
        image.save(buffer := io.BytesIO(), "JPEG")
        images.append(buffer.getvalue())
    for i, split in enumerate(("train", "val")):
        coco(tmp_path / "coco", split, seed=i)
        for k, path in enumerate((tmp_path / "coco" / f"{split}2017").glob("*.jpg")):
            path.write_bytes(images[k % 8])
    words = ["--kind", "coco", "--root", str(tmp_path / "coco"), "--out", str(tmp_path / "out"), "--pairs", "1"]
    words += ["--seeds", "1", "--train", "60", "--evaluation", "40", "--methods", "upsampled"]
    monkeypatch.setattr(controlled, "is_valid", lambda eps, tau=0.1: True)
    run(
        [*words, "--v", "0.5", "--min-images", "30", "--jobs", "1", "OPTIM.MAX_EPOCH", "1", "DISCOVERY.THRESHOLD", "-1"]
    )
    (standard,) = json.loads((tmp_path / "out" / "results.json").read_text())["models"]
    label, feature = standard["target"].split(" with ")
    (setting,) = (json.loads(p.read_text()) for p in tmp_path.glob("out/settings/coco-*/setting.json"))
    assert (setting["target"], setting["feature"]) == (label, feature) and setting["v_asked"] == 0.5
    config = next(tmp_path.glob("out/runs/*/standard/seed1/config.yaml")).read_text()
    assert f"PLANTED: {feature}" in config and "PATH: ''" in config and 0 <= standard["precision"]["RaVL"] <= 1


def test_command_line_of_a_part_is_the_part(tmp_path: Path) -> None:
    plan = Plan("mnist", "a.yaml", ("MODEL.BACKBONE.PATH", "x.pt"), ("OPTIM.LR", "0.5"))
    for found in (None, tmp_path / "found"):
        part = Part(plan, tmp_path / "setting", "RaVL", 3, tmp_path / "run", "RaVL, nine", found)
        assert part.command[1:3] == ["-m", "oodprompt.studies.part"] and part_of(part.command[3]) == part
        assert not part.is_finished() and part.outcome() == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "ravel"], "--methods: 'ravel' is none of"),
        (["--jobs", "0"], "--jobs"),
        (["--targets", "ten"], "ten"),
        (["--v", "1.5"], "1.5"),
        (["--mitigation-seeds", "7"], "must be among --seeds"),
        (["--root", "nowhere"], "nowhere"),
        (["--pairs", "3"], "--pairs: only for --kind coco"),
        (["--kind", "coco", "--targets", "cat"], "leave out --targets and --download"),
        (["--kind", "coco"], "instances_train2017.json; put COCO's annotations there"),
    ],
)
def test_wrong_words(idx_root: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(["--root", str(idx_root), "--out", str(tmp_path), "--train", "40", "--evaluation", "40", *words])


def test_methods_are_those_of_the_paper() -> None:
    assert list(METHODS) == ["standard", "upsampled", "VL-ERM", "VL-GDRO", "RaVL"]
