"""What discovery writes for programs and as text: the json and the table; and reading it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from oodprompt.errors import UserError
from oodprompt.regions.boxes import Regions
from oodprompt.reports import discovery as report
from oodprompt.reports.discovery import discovery_table, read_discovery, write_discovery
from tests.helpers.made_up_discovery import CLASSES, arguments, card, images, written

# ---- the json


def test_the_four_files_are_written(tmp_path: Path) -> None:
    files = write_discovery(directory=tmp_path / "new" / "folder", **arguments())
    assert [file.name for file in files] == ["discovery.json", "discovery.md", "discovery.html", "discovery.png"]
    assert all(file.parent == tmp_path / "new" / "folder" and file.stat().st_size > 100 for file in files)
    assert len(list((tmp_path / "new" / "folder").iterdir())) == 4


def test_every_file_goes_through_write_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []

    def write(path: Path, content: bytes | str) -> None:
        names.append(Path(path).name)

    monkeypatch.setattr(report, "write_atomically", write)
    monkeypatch.setattr("oodprompt.reports.style.write_atomically", write)
    write_discovery(directory=tmp_path, **arguments())
    assert names == ["discovery.json", "discovery.md", "discovery.html", "discovery.png"]
    assert not list(tmp_path.iterdir())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [file.read_bytes() for file in write_discovery(directory=tmp_path / "a", **arguments())]
    assert first == [file.read_bytes() for file in write_discovery(directory=tmp_path / "b", **arguments())]


def test_json_holds_the_clustering(tmp_path: Path) -> None:
    given = arguments()
    content, _ = written(tmp_path)
    clustering = given["discovery"].clustering
    assert content["clustering"] == {
        "k": 3,
        "silhouette": 0.625,
        "silhouettes": [[3, 0.625], [4, 0.5], [5, None]],
        "objective": 12.5,
        "medoids": clustering.medoids.tolist(),
        "assignment": clustering.assignment.tolist(),
        "owner": given["regions"].owner.tolist(),
    }
    assert content["facts"] == given["facts"] and content["classnames"] == list(CLASSES)
    assert (content["num_images"], content["num_regions"], content["extra"]) == (30, 60, {})
    assert content["accuracy"] == pytest.approx((0 + 4 + 4 + 4 + 4 + 1) / 30)


def test_json_holds_what_each_cluster_does(tmp_path: Path) -> None:
    content, _ = written(tmp_path)
    first, second, last = content["clusters"]
    assert [c["index"] for c in content["clusters"]] == [1, 2, 0]
    assert [c["survives"] for c in content["clusters"]] == [True, False, False]
    assert (first["reason"], second["reason"]) == ("", "influence 0.10 < 0.25")
    assert (first["influence"], last["influence"]) == (0.75, None)
    assert (first["helps"], first["hurts"]) == ("nine", ["one"])
    assert (last["helps"], last["hurts"], last["classes"], last["score"]) == (None, [], [], 0)
    assert (first["num_regions"], first["num_images"]) == (15, 15)
    assert (last["num_regions"], last["num_images"]) == (30, 30)
    # by hand: one 8/10 (0/6 - 4/4), seven 10/10 (4/5 - 4/5), nine 8/10 (4/4 - 1/6)
    nine, seven, one = first["classes"]
    assert one == {"class": "one", "label": 0, "p_in": 0, "n_in": 6, "p_out": 1, "n_out": 4, "weight": 0.8, "gap": -0.8}
    assert (seven["class"], seven["gap"], seven["weight"]) == ("seven", 0, 1)
    assert nine["class"] == "nine" and nine["gap"] == pytest.approx(0.8 * 5 / 6)
    assert first["score"] == pytest.approx(0.8 + 0.8 * 5 / 6)


def test_num_images_counts_an_image_once(tmp_path: Path) -> None:
    given = arguments()
    both = dataclasses.replace(given["discovery"].clusters[0], regions=np.arange(10), similarity=np.ones(10))
    discovery = dataclasses.replace(given["discovery"], clusters=(both,))
    content, _ = written(tmp_path, discovery=discovery)
    assert (content["clusters"][0]["num_regions"], content["clusters"][0]["num_images"]) == (10, 5)


def test_json_holds_the_top_regions_in_order(tmp_path: Path) -> None:
    given = arguments()
    content, _ = written(tmp_path, top=5)
    cluster, rows = given["discovery"].clusters[0], content["clusters"][0]["regions"]
    assert [row["region"] for row in rows] == cluster.regions[:5].tolist()
    assert [row["index"] for row in rows] == (cluster.regions[:5] // 2).tolist()
    assert [row["image"] for row in rows] == [given["images"][r // 2] for r in cluster.regions[:5]]
    assert [row["similarity"] for row in rows] == pytest.approx(cluster.similarity[:5], abs=1e-6)
    assert all(row["box"] == [0.5, 0, 1, 0.75] for row in rows)
    for row in rows:
        assert row["true"] == CLASSES[given["label"][row["index"]]]
        assert row["predicted"] == CLASSES[given["predicted"][row["index"]]]
    assert content["clusters"][0]["medoid"]["region"] == cluster.medoid
    assert "planted" not in rows[0] and "name" not in rows[0]


def test_examples_of_harm(tmp_path: Path) -> None:
    label, predicted, has = images()
    content, page = written(tmp_path)
    hurt, helped = content["clusters"][0]["harm"]["hurt"], content["clusters"][0]["harm"]["helped"]
    # images of "one" with the cluster in the order of their regions: the first four come last
    assert [row["index"] for row in hurt] == [4, 5, 0, 1, 2, 3]
    assert all(row["region"] == 2 * row["index"] + 1 for row in hurt)
    # images of "nine" without it: the five wrong ones, then the right one
    right = np.flatnonzero((label == 2) & ~has & (predicted == 2)).tolist()
    wrong = np.flatnonzero((label == 2) & ~has & (predicted != 2)).tolist()
    assert [row["index"] for row in helped] == wrong + right
    assert all("box" not in row for row in helped)
    shown = card(page, 1)
    assert "“one” with it: right 0 % of 6 images" in shown and "“nine” without it: right 17 % of 6 images" in shown
    assert shown.count("<img ") == 12 + 6 + 6


def test_an_image_of_harm_is_shown_once_with_its_most_typical_region(tmp_path: Path) -> None:
    given = arguments()
    cluster = dataclasses.replace(
        given["discovery"].clusters[0], regions=np.array([3, 2, 1, 0]), similarity=np.array([1, 0.9, 0.8, 0.7])
    )
    content, _ = written(tmp_path, discovery=dataclasses.replace(given["discovery"], clusters=(cluster,)))
    assert [(row["index"], row["region"]) for row in content["clusters"][0]["harm"]["hurt"]] == [(1, 3), (0, 1)]


def test_images_of_harm_are_mispredicted(tmp_path: Path) -> None:
    _, predicted, _ = images()
    predicted[[0, 4]] = 0
    content, _ = written(tmp_path, predicted=predicted)
    assert [row["index"] for row in content["clusters"][0]["harm"]["hurt"]] == [5, 1, 2, 3]


def test_wrong_images_come_from_all_over_the_split(tmp_path: Path) -> None:
    given = arguments(predicted=np.zeros(30, int))  # all of "nine" wrong, and cluster 1 taken from most images
    cluster = dataclasses.replace(given["discovery"].clusters[0], regions=np.array([1]), similarity=np.ones(1))
    given["discovery"] = dataclasses.replace(given["discovery"], clusters=(cluster,))
    write_discovery(directory=tmp_path, **given)
    helped = read_discovery(tmp_path)["clusters"][0]["harm"]["helped"]
    assert [row["index"] for row in helped] == [20, 21, 23, 25, 27, 29]


@pytest.mark.parametrize(("hits", "precision"), [(10, 1.0), (7, 0.7), (0, 0.0)])
def test_precision_at_10(tmp_path: Path, hits: int, precision: float) -> None:
    truth = np.zeros(60, bool)
    regions = arguments()["discovery"].clusters[0].regions
    truth[regions[:hits]] = True
    truth[regions[10:]] = True  # beyond the first ten, which must not count
    content, page = written(tmp_path, truth=truth)
    assert content["clusters"][0]["precision_at_10"] == pytest.approx(precision)
    assert [row["planted"] for row in content["clusters"][0]["regions"][:10]] == [True] * hits + [False] * (10 - hits)
    assert f"<dt>Precision@10</dt><dd>{precision:.2f}</dd>" in card(page, 1)
    assert card(page, 1).count("◆ planted") == hits + 2 and card(page, 1).count("◇ not planted") == 10 - hits
    assert f"{precision:.2f}" in discovery_table(content).splitlines()[2] and "Precision@10" in discovery_table(content)


def test_without_truth_nothing_speaks_of_precision(tmp_path: Path) -> None:
    content, page = written(tmp_path)
    assert content["clusters"][0]["precision_at_10"] is None
    assert "Precision" not in page and "planted" not in page and "Precision" not in discovery_table(content)


def test_names_of_an_annotation_are_counted(tmp_path: Path) -> None:
    regions = arguments()["regions"]
    names = ["", "sign"] * 20 + ["", "<man>"] * 10
    content, page = written(tmp_path, regions=dataclasses.replace(regions, names=names))
    assert content["clusters"][0]["names"] == {"sign": 11, "<man>": 4}
    assert content["clusters"][2]["names"] == {}
    assert "among all 15: “sign” (11) and “&lt;man&gt;” (4)." in page
    assert content["clusters"][0]["medoid"]["name"] == "sign"


def test_extra_is_kept_and_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    features = np.array([[0.5, -np.inf], [np.nan, 1]], np.float32)
    extra = {"medoid_features": features, "t": torch.ones(2), "deep": [{1: np.int64(3)}, (np.inf,)], "p": Path("a")}
    content, _ = written(tmp_path, extra=extra)
    assert content["extra"] == {
        "medoid_features": [[0.5, None], [None, 1]],
        "t": [1, 1],
        "deep": [{"1": 3}, [None]],
        "p": "a",
    }
    text = (tmp_path / "discovery.json").read_text()
    assert not re.search(r"NaN|Infinity", text)


def test_json_is_compact_and_a_cluster_a_line(tmp_path: Path) -> None:
    written(tmp_path)
    lines = (tmp_path / "discovery.json").read_text().splitlines()
    assert len(lines) < 20
    assert sum(line.lstrip().startswith('{"index": ') for line in lines) == 3


def test_lengths_that_differ_are_refused(tmp_path: Path) -> None:
    for changes in (
        {"label": np.zeros(29, int)},
        {"predicted": np.zeros(31, int)},
        {"images": ["a"] * 29},
        {"truth": np.zeros(30, bool)},
        {"regions": Regions(torch.zeros(59, 4), torch.zeros(60, dtype=torch.long))},
        {"regions": Regions(torch.zeros(58, 4), torch.zeros(58, dtype=torch.long))},
    ):
        with pytest.raises(ValueError, match="length|regions"):
            write_discovery(directory=tmp_path, **arguments(**changes))
    assert not list(tmp_path.iterdir())


# ---- reading it


def test_read_takes_the_file_or_its_folder(tmp_path: Path) -> None:
    written(tmp_path)
    assert read_discovery(tmp_path) == read_discovery(str(tmp_path / "discovery.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is broken"),
        ("\xff\xfe", "is broken"),
        ("[1]", "is not what discovery writes"),
        ("{}", "is not what discovery writes"),
        ('{"format": "other", "version": 1}', "is not what discovery writes"),
        ('{"format": "oodprompt discovery", "version": 2}', "of format version 2, this release reads 1"),
        ('{"format": "oodprompt discovery"}', "of format version None"),
        ('{"format": "oodprompt discovery", "version": 1}', "no usable 'title'"),
    ],
)
def test_read_refuses_what_is_broken_or_foreign(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "discovery.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as error:
        read_discovery(tmp_path)
    assert "discovery.json" in str(error.value) and "\n" not in str(error.value)


def test_read_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist: name a folder in which discovery ran"):
        read_discovery(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"discovery\.json does not exist"):
        read_discovery(tmp_path)


def test_read_says_that_a_place_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "discovery.json").mkdir()
    with pytest.raises(UserError, match="cannot read"):
        read_discovery(tmp_path)


@pytest.mark.parametrize("part", ["clusters", "clustering.owner", "clusters[1].harm", "facts"])
def test_read_names_what_is_lacking(tmp_path: Path, part: str) -> None:
    written(tmp_path)
    file = tmp_path / "discovery.json"
    content = json.loads(file.read_text())
    if part == "facts":
        content["facts"] = "text"
    elif part == "clusters":
        del content["clusters"]
    elif part == "clustering.owner":
        del content["clustering"]["owner"]
    else:
        del content["clusters"][1]["harm"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(f"no usable '{part}'")):
        read_discovery(file)


# ---- the table


def test_table_shows_survivors_and_the_best_others(tmp_path: Path) -> None:
    content, _ = written(tmp_path)
    _, _, *rows = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in discovery_table(content, near=1).splitlines()
    )
    assert rows == [
        ["1", "1.47", "0.75", "15", "15", "nine: 100 % (4) / 17 % (6)", "one: 0 % (6) / 100 % (4)", "survives"],
        ["2", "0.80", "0.10", "15", "15", "-", "one: 0 % (6) / 100 % (4)", "dropped: influence 0.10 < 0.25"],
    ]
    last = discovery_table(content).splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")][:3] == ["0", "0.00", "none"]
    markdown = (tmp_path / "discovery.md").read_text()
    assert discovery_table(content) in markdown and markdown.startswith("# Discovery on digits\n")
    assert "1 of 3 clusters survives the filters. The strongest is tied to “nine”." in markdown
    assert re.search(r"\| threshold +\| 0\.25 +\|", markdown)
