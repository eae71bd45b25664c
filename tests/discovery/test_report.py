"""What discovery writes: the json, the table, the gallery and the figure."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from oodprompt.discovery.result import Cluster, Clustering, Discovery, Gap
from oodprompt.errors import UserError
from oodprompt.regions.boxes import Regions
from oodprompt.reports import discovery as report
from oodprompt.reports.discovery import discovery_table, read_discovery, write_discovery

# Of each class 10 images in a row: the first n_in have cluster 1, and the first so many of both parts are right.
CLASSES = ("one", "seven", "nine")
WITH = ((6, 0), (5, 4), (4, 4))  # class -> images with the cluster, right ones of them
WITHOUT_RIGHT = (4, 4, 1)
PLANTED = 1


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True class, predicted class, and whether the image has cluster 1, of 30 images."""
    label, predicted, has = [], [], []
    for y, ((n_in, right), right_out) in enumerate(zip(WITH, WITHOUT_RIGHT, strict=True)):
        label += [y] * 10
        has += [True] * n_in + [False] * (10 - n_in)
        for n, k in ((n_in, right), (10 - n_in, right_out)):
            predicted += [y] * k + [(y + 2) % 3 if y < 1 else (y + 1) % 3] * (n - k)
    return np.array(label), np.array(predicted), np.array(has)


def load(index: int) -> Image.Image:
    """16 by 16 noise, another for every image."""
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (16, 16, 3), dtype=np.uint8))


def arguments(survive: bool = True, **changes: Any) -> dict[str, Any]:
    """Two regions, left and right, of each of 30 images; the right one is in cluster 1 where the image has it.

    Cluster 0: the left halves; 2: the other right halves. Cluster 1 alone survives, if any does.
    """
    label, predicted, has = images()
    assignment = np.array([(0, 1 if here else 2) for here in has]).ravel()
    boxes = torch.tensor([(0, 0, 0.5, 1), (0.5, 0, 1, 0.75)] * 30, dtype=torch.float32)
    gaps = tuple(
        Gap(y, right / n, n, right_out / (10 - n), 10 - n)
        for y, ((n, right), right_out) in enumerate(zip(WITH, WITHOUT_RIGHT, strict=True))
    )
    own = [np.flatnonzero(assignment == c) for c in range(3)]
    planted = np.concatenate([own[1][4:], own[1][:4]])  # nearest to the medoid first
    similar = [np.linspace(1, 0.5, len(regions)) for regions in own]
    clusters = (
        Cluster(1, int(planted[0]), planted, similar[1], gaps, 0.75, survive, "" if survive else "too few"),
        Cluster(2, int(own[2][0]), own[2], similar[2], gaps[:1], 0.1, False, "influence 0.10 < 0.25"),
        Cluster(0, int(own[0][0]), own[0], similar[0], (), -np.inf, False, "no class <both> with and without"),
    )
    clustering = Clustering(assignment, np.array([0, planted[0], 1]), 12.5, 0.625, {3: 0.625, 4: 0.5, 5: float("nan")})
    return {
        "discovery": Discovery(clustering, clusters),
        "regions": Regions(boxes, torch.arange(30).repeat_interleave(2), source="halves"),
        "images": [f"data/{i:03d}.png" for i in range(30)],
        "label": label,
        "predicted": predicted,
        "classnames": CLASSES,
        "load": load,
        "title": "Discovery on digits",
        "facts": {"model": "CoOp", "threshold": "0.25"},
    } | changes


def written(directory: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The json and the page; the figure is left blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_figure", lambda *_: Figure())
        write_discovery(directory=directory, **arguments(**changes))
    return read_discovery(directory), (directory / "discovery.html").read_text(encoding="utf-8")


class Tree(HTMLParser):
    """Checks that tags are balanced; keeps elements with their attributes, and texts with the tags they are in."""

    void = {"img", "meta", "link"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        return "".join(text for tags, text in self.texts if "style" not in tags and "title" not in tags)


def card(page: str, index: int) -> str:
    """The markup of one cluster's card."""
    return page.split(f'id="c{index}"')[1].split("</article>")[0]


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


# ---- the page


def test_page_is_well_formed_and_loads_nothing(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    tree = Tree(page)
    assert page.startswith("<!doctype html>")
    assert [a["lang"] for a in tree.all("html")] == ["en"]
    assert {"charset": "utf-8"} in tree.all("meta")
    assert not re.search(r"https?:|url\(|@import|<script|<iframe|<object|//", re.sub(r"base64,[^\"]*", "", page))
    for _, attributes in tree.elements:
        for key in ("src", "href", "action", "srcset"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#"))
        assert not any(key.startswith("on") for key in attributes)
    policy = next(m["content"] for m in tree.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "script" not in policy
    assert "prefers-color-scheme:dark" in page and "@media print" in page


def test_page_says_the_effects_in_words(tmp_path: Path) -> None:
    text = Tree(written(tmp_path)[1]).text
    assert "Where this is present, “nine” is right 100 % of the time (4 images); without it 17 % (6)." in text
    assert "▼ hurts Where this is present, “one” is right 0 % of the time (6 images); without it 100 % (4)." in text
    assert "1 of 3 clusters survives the filters. The strongest is tied to “nine”." in text
    assert "1 · cluster 1 · 15 regions in 15 images" in text and "15 further" not in text


def test_other_hurt_classes_are_listed(tmp_path: Path) -> None:
    given = arguments()
    one, seven, nine = given["discovery"].clusters[0].gaps
    gaps = (one, dataclasses.replace(seven, p_in=0.2), nine)
    cluster = dataclasses.replace(given["discovery"].clusters[0], gaps=gaps)
    _, page = written(tmp_path, discovery=dataclasses.replace(given["discovery"], clusters=(cluster,)))
    text = Tree(page).text
    assert "▼ hurts Where this is present, “one” is right 0 %" in text and "▼ hurts also “seven”." in text
    assert "“one” with it: right 0 % of 6 images" in text


def test_numbers_of_the_page_are_those_of_the_json(tmp_path: Path) -> None:
    content, page = written(tmp_path)
    first = content["clusters"][0]
    shown = card(page, 1)
    assert f"<dt>gap G</dt><dd>{first['score']:.2f}</dd>" in shown
    assert f"<dt>influence H</dt><dd>{first['influence']:.2f}</dd>" in shown
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</th>(.*?)</tr>", shown)
    assert [name for name, _ in rows] == [row["class"] for row in first["classes"]] == ["nine", "seven", "one"]
    for (_, markup), row in zip(rows, first["classes"], strict=True):
        bars = re.findall(r'width="([\d.]+)%" height="9" rx="2" class="(with|without)"', markup)
        widths = {kind: width for width, kind in bars}
        assert float(widths["with"]) == pytest.approx(100 * row["p_in"], abs=0.01)
        assert float(widths["without"]) == pytest.approx(100 * row["p_out"], abs=0.01)
        text = Tree(f"<table><tr>{markup}</tr></table>").text
        for kind, p, n in (("with", "p_in", "n_in"), ("without", "p_out", "n_out")):
            assert f"{kind}: {100 * row[p]:.0f} % of {row[n]}" in text
        assert text.endswith(f"{row['gap']:+.2f}".replace("-", "−") if row["gap"] else "0.00")
    text = Tree(page).text
    assert "cluster 2 · G 0.80 · H 0.10Did not survive: influence 0.10 < 0.25" in text
    assert "cluster 0 · G 0.00 · H noneDid not survive: no class <both> with and without" in text
    assert f"K = 3 has the highest mean silhouette, {content['clustering']['silhouette']:.2f}." in text
    assert f"accuracy{100 * content['accuracy']:.0f} %" in text


def test_every_picture_has_words_and_wrong_ones_a_mark(tmp_path: Path) -> None:
    content, page = written(tmp_path)
    tree = Tree(page)
    assert all(image["alt"] and image["width"] == "16" for image in tree.all("img"))
    alt = tree.all("img")[0]["alt"]
    row = content["clusters"][0]["regions"][0]
    assert alt == (
        f"{row['image'][5:]}, is {row['true']}, said {row['predicted']}; the region of cluster 1 spans "
        "50 % to 100 % from the left, 0 % to 75 % from the top"
    )
    figures = re.findall(r"<figure class=\"(\w+)\">(.*?)</figure>", page)
    assert {kind for kind, _ in figures} == {"right", "wrong"}
    for kind, figure in figures:
        text = Tree(figure).text
        assert text.count("✓") == (kind == "right") and text.count("✗") == (kind == "wrong")
        true, said = re.search(r"is (\w+)[✓✗](?:right|wrong) said (\w+)", text).groups()
        assert (true == said) == (kind == "right")


def test_boxes_are_outlined_over_the_dimmed_rest(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    figure = re.search(r"<figure.*?</figure>", page)[0]
    paths = Tree(figure).all("path")
    assert [path["class"] for path in paths] == ["dim", "edge", "box"]
    assert paths[0]["d"] == "M0 0H100V100H0ZM50 0H100V75H50Z" and paths[0]["fill-rule"] == "evenodd"
    assert paths[1]["d"] == paths[2]["d"] == "M50 0H100V75H50Z"


def decoded(attributes: dict[str, str | None], kind: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].removeprefix(f"data:image/{kind};base64,"))))


def test_small_images_are_kept_pixel_by_pixel_and_large_ones_shrunk(tmp_path: Path) -> None:
    content, page = written(tmp_path)
    images = Tree(page).all("img")
    assert all(image["class"] == "pixels" for image in images) and "image-rendering:pixelated" in page
    first = content["clusters"][0]["regions"][0]["index"]
    assert np.array_equal(np.asarray(decoded(images[0], "png")), np.asarray(load(first)))
    assert decoded(images[-1], "png").size == (16, 16)
    images = Tree(written(tmp_path, load=lambda i: load(i).resize((448, 224)))[1]).all("img")
    assert (decoded(images[0], "jpeg").size, decoded(images[-1], "jpeg").size) == ((176, 88), (96, 48))
    assert "class" not in images[0] and (images[0]["width"], images[0]["height"]) == ("448", "224")


def test_any_mode_of_image_is_shown(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        _, page = written(tmp_path, load=lambda i, mode=mode: load(i).convert(mode))
        assert decoded(Tree(page).all("img")[0], "png").mode == "RGB"


def test_each_image_is_read_once(tmp_path: Path) -> None:
    read: list[int] = []
    write_discovery(directory=tmp_path, **arguments(load=lambda i: read.append(i) or load(i)))
    assert len(read) == len(set(read)) > 10


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    def broken(index: int) -> Image.Image:
        raise FileNotFoundError("gone")

    with pytest.raises(UserError, match=r"cannot read data/\d+\.png for the gallery: gone"):
        write_discovery(directory=tmp_path, **arguments(load=broken))


HOSTILE = '</title><script>alert("1")</script> & \'$x$ | <img src=x onerror=y>'


def test_all_words_of_users_are_escaped(tmp_path: Path) -> None:
    plain = len(Tree(written(tmp_path)[1]).elements)
    given = arguments()
    clusters = [dataclasses.replace(c, reason=HOSTILE) for c in given["discovery"].clusters]
    clusters[0] = dataclasses.replace(clusters[0], reason="")
    content, page = written(
        tmp_path,
        classnames=[f"{HOSTILE}{i}" for i in range(3)],
        title=HOSTILE,
        facts={HOSTILE: HOSTILE, "b": '"><b>'},
        images=[f'{HOSTILE}"/{i}">.png' for i in range(30)],
        discovery=dataclasses.replace(given["discovery"], clusters=tuple(clusters)),
    )
    tree = Tree(page)
    assert not tree.all("script") and not any("onerror" in attributes for _, attributes in tree.elements)
    assert len(tree.elements) == plain
    assert HOSTILE in [text for tags, text in tree.texts if tags[-1:] == ("h1",)]
    assert f"“{HOSTILE}2” is right 100 % of the time" in tree.text and f"Did not survive: {HOSTILE}" in tree.text
    assert tree.all("img")[0]["title"] == content["clusters"][0]["regions"][0]["image"]
    assert content["title"] == HOSTILE
    rows = [line for line in discovery_table(content).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_page_when_nothing_survives(tmp_path: Path) -> None:
    content, page = written(tmp_path, survive=False)
    text = Tree(page).text
    verdict = "None of the 3 clusters survives the filters. That is a normal outcome:"
    assert verdict in text and verdict in (tmp_path / "discovery.md").read_text()
    assert "Nearest candidates" in text and "Did not survive: too few" in text
    assert 'id="c1"' in page and '<h2 id="c1-name">Helps “nine”</h2>' in page and "Tied to" not in page
    assert "What it costs" in page and "<nav" not in page
    assert "dropped: too few" in discovery_table(content)


def test_page_without_any_cluster(tmp_path: Path) -> None:
    nothing = dataclasses.replace(arguments()["discovery"], clusters=())
    _, page = written(tmp_path, discovery=nothing)
    assert "No cluster was found." in Tree(page).text and "<article" not in page


def many(count: int, survivors: int) -> Discovery:
    given = arguments()["discovery"]
    first = given.clusters[0]
    return dataclasses.replace(
        given,
        clusters=tuple(
            dataclasses.replace(first, index=i, survives=i < survivors, reason=f"because {i}") for i in range(count)
        ),
    )


@pytest.mark.parametrize("side", [48, 64, 65, 224])
def test_twelve_clusters_fit_in_3_mb_even_of_noise(tmp_path: Path, side: int) -> None:
    def noise(index: int) -> Image.Image:
        return Image.fromarray(np.random.default_rng(index).integers(0, 255, (side, side, 3), dtype=np.uint8))

    _, page = written(tmp_path, discovery=many(40, 12), load=noise)
    assert 500_000 < len(page.encode()) < 3_000_000
    assert page.count("<article") == 12 and page.count('href="#c') == 12


def test_more_clusters_than_fit_are_counted(tmp_path: Path) -> None:
    content, page = written(tmp_path, discovery=many(50, 14))
    text = Tree(page).text
    assert page.count("<article") == 12 and "2 further clusters that survived" in text
    assert "36 clusters that did not survive, and why" in text and "16 further ones in discovery.json." in text
    assert text.count("Did not survive") == 20
    assert len(discovery_table(content, near=3).splitlines()) == 2 + 14 + 3


def test_nearest_candidates_are_not_listed_again(tmp_path: Path) -> None:
    _, page = written(tmp_path, discovery=many(5, 0))
    assert re.findall(r'<article id="(\w+)"', page) == ["c0", "c1", "c2"]
    assert "2 further clusters that did not survive, and why" in page
    assert re.findall("because .", Tree(page).text) == [f"because {i}" for i in range(5)]


def test_many_classes_show_the_largest_gaps(tmp_path: Path) -> None:
    gaps = tuple(Gap(y, 1.0 if y % 2 else 0.0, y + 1, 0.5, 40) for y in range(20))
    given = arguments()
    cluster = dataclasses.replace(given["discovery"].clusters[0], gaps=gaps)
    names = [f"class {y}" for y in range(20)]
    discovery = dataclasses.replace(given["discovery"], clusters=(cluster,))
    content, page = written(tmp_path, discovery=discovery, classnames=names)
    shown = re.findall(r"<th scope=\"row\">(.*?)</th>", page)
    assert shown == [f"class {y}" for y in (19, 17, 15, 13, 11, 9, 7, 6, 8, 10, 12, 14, 16, 18)]
    assert "6 classes with smaller gaps left out." in page
    assert len(content["clusters"][0]["classes"]) == 20
    assert "and 1 more." in Tree(page).text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.041, "4 %"), (0.996, "99.6 %"), (0.9999, "99.9 %"), (0.0001, "0.1 %")],
)
def test_only_all_is_100_per_cent_and_only_none_0(value: float, text: str) -> None:
    assert report._share(value) == text


def test_silhouettes_are_drawn_to_scale(tmp_path: Path) -> None:
    given = arguments()["discovery"]
    clustering = dataclasses.replace(given.clustering, silhouettes={2: 0.2, 3: 0.4, 4: 0.3}, silhouette=0.4)
    _, page = written(tmp_path, discovery=dataclasses.replace(given, clustering=clustering))
    (line,) = Tree(page).all("polyline")
    assert line["points"] == "46.0,130.0 196.0,25.0 346.0,77.5"
    assert [(c["cx"], c["cy"]) for c in Tree(page).all("circle")] == [("196.0", "25.0")]


@pytest.mark.parametrize("silhouettes", [{}, {3: 0.5}, {3: 0.5, 4: 0.5}, {3: float("nan")}])
def test_few_silhouettes(tmp_path: Path, silhouettes: dict[int, float]) -> None:
    given = arguments()["discovery"]
    clustering = dataclasses.replace(given.clustering, silhouettes=silhouettes)
    _, page = written(tmp_path, discovery=dataclasses.replace(given, clustering=clustering))
    assert ("How many clusters" in page) == (np.isfinite(list(silhouettes.values())).sum() > 0)
    assert Tree(page).elements


# ---- the figure


def figure_texts(content: dict[str, Any]) -> tuple[Any, str]:
    figure = report._figure(content, report._Pictures(load, [""] * 30))
    texts = [t.get_text() for t in figure.texts]
    for axes in figure.axes:
        texts += [t.get_text() for t in [*axes.texts, *axes.get_yticklabels()]]
    return figure, "\n".join(texts)


def test_figure_shows_regions_and_bars(tmp_path: Path) -> None:
    content, _ = written(tmp_path)
    figure, text = figure_texts(content)
    pictures, bars = [a for a in figure.axes if a.images], [a for a in figure.axes if not a.images]
    assert len(pictures) == 8 and len(bars) == 1
    assert "cluster 1 · G 1.47 · H 0.75 · helps “nine” · hurts “one”" in text
    assert [bar.get_width() for bar in bars[0].patches] == pytest.approx([100, 80, 0, 100 / 6, 80, 100])
    assert [t.get_text() for t in bars[0].texts] == [
        *("100 % of 4", "80 % of 5", "0 % of 6"),
        *("17 % of 6", "80 % of 5", "100 % of 4"),
    ]
    places = [axes.get_position() for axes in figure.axes]
    assert all(0 < p.x0 < p.x1 < 1 and 0 < p.y0 < p.y1 < 1 for p in places)
    assert not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])
    assert "nine  +0.67" in text and "1 of 3 clusters survives" in text
    row = content["clusters"][0]["regions"][0]
    shown, pixels = pictures[0].images[0].get_array(), np.asarray(load(row["index"])) / 255
    assert np.allclose(shown[:12, 8:], pixels[:12, 8:]) and np.allclose(shown[:, :8], pixels[:, :8] / 2)
    assert np.allclose(shown[12:], pixels[12:] / 2)
    assert pictures[0].patches[0].get_bbox().extents.tolist() == [0.5, 0, 1, 0.75]
    assert f"{row['true']}\nsaid {row['predicted']} ✗" in text or f"{row['true']} ✓" in text


def test_figure_when_nothing_survives(tmp_path: Path) -> None:
    content, _ = written(tmp_path, survive=False)
    _, text = figure_texts(content)
    assert "None of the 3 clusters survives the filters" in text and "dropped: too few" in text


def test_dollars_are_no_formula_in_the_figure(tmp_path: Path) -> None:
    content, _ = written(tmp_path, classnames=["$a$", "$b_c$", "$d"], title="$e^$")
    assert r"\$d" in figure_texts(content)[1]
