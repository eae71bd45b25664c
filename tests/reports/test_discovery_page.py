"""The page of a discovery."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oodprompt.discovery.result import Gap
from oodprompt.reports.discovery import discovery_table, write_discovery
from tests.helpers.html_tree import Tree
from tests.helpers.made_up_discovery import arguments, card, load, many, written


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
    assert "prefers-color-scheme: dark" in page and "@media print" in page


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
    rows = re.findall(r"<tr>\s*<th scope=\"row\">(.*?)</th>(.*?)</tr>", shown, re.S)
    assert [name for name, _ in rows] == [row["class"] for row in first["classes"]] == ["nine", "seven", "one"]
    for (_, markup), row in zip(rows, first["classes"], strict=True):
        bars = re.findall(r'width="([\d.]+)%" height="9" rx="2" class="(with|without)"', markup)
        widths = {kind: width for width, kind in bars}
        assert float(widths["with"]) == pytest.approx(100 * row["p_in"], abs=0.01)
        assert float(widths["without"]) == pytest.approx(100 * row["p_out"], abs=0.01)
        text = Tree(f"<table><tr>{markup}</tr></table>").text
        for kind, p, n in (("with", "p_in", "n_in"), ("without", "p_out", "n_out")):
            assert f"{kind}: {100 * row[p]:.0f} % of {row[n]}" in text
        assert text.strip().endswith(f"{row['gap']:+.2f}".replace("-", "−") if row["gap"] else "0.00")
    text = Tree(page).text
    assert "cluster 2 · G 0.80 · H 0.10 Did not survive: influence 0.10 < 0.25" in text
    assert "cluster 0 · G 0.00 · H none Did not survive: no class <both> with and without" in text
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
    figures = re.findall(r"<figure class=\"(\w+)\">(.*?)</figure>", page, re.S)
    assert {kind for kind, _ in figures} == {"right", "wrong"}
    for kind, figure in figures:
        text = Tree(figure).text
        assert text.count("✓") == (kind == "right") and text.count("✗") == (kind == "wrong")
        true, said = re.search(r"is (\w+)\s*[✓✗](?:right|wrong) said (\w+)", text).groups()
        assert (true == said) == (kind == "right")


def test_boxes_are_outlined_over_the_dimmed_rest(tmp_path: Path) -> None:
    _, page = written(tmp_path)
    figure = re.search(r"<figure.*?</figure>", page, re.S)[0]
    paths = Tree(figure).all("path")
    assert [path["class"] for path in paths] == ["dim", "edge", "box"]
    assert paths[0]["d"] == "M0 0H100V100H0ZM50 0H100V75H50Z" and paths[0]["fill-rule"] == "evenodd"
    assert paths[1]["d"] == paths[2]["d"] == "M50 0H100V75H50Z"


def decoded(attributes: dict[str, str | None], kind: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(attributes["src"].removeprefix(f"data:image/{kind};base64,"))))


def test_small_images_are_kept_pixel_by_pixel_and_large_ones_shrunk(tmp_path: Path) -> None:
    content, page = written(tmp_path)
    images = Tree(page).all("img")
    assert all(image["class"] == "pixels" for image in images) and "image-rendering: pixelated" in page
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


def test_an_unreadable_image_costs_the_pictures_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(index: int) -> Image.Image:
        raise FileNotFoundError("gone")

    files = write_discovery(directory=tmp_path, **arguments(load=broken))
    assert [file.name for file in files] == ["discovery.json", "discovery.md"]
    notes = capsys.readouterr().out.splitlines()
    assert [note.split(" is missing: ")[0] for note in notes] == ["Note: discovery.html", "Note: discovery.png"]
    assert re.search(r"cannot read data/\d+\.png for the gallery: gone", notes[0])


HOSTILE = '</title><script>alert("1")</script> & \'$x$ | <img src=x onerror=y>'


@pytest.mark.parametrize("survive", [True, False])
def test_all_words_of_users_are_escaped(tmp_path: Path, survive: bool) -> None:
    """Class names, annotation names, paths, facts, title and reasons, in the page and in the table."""
    names = ["", "sign"] * 30
    given = arguments(survive)
    regions = dataclasses.replace(given["regions"], names=names)
    plain = Tree(written(tmp_path, survive=survive, regions=regions)[1]).elements
    clusters = [dataclasses.replace(c, reason="" if c.survives else HOSTILE) for c in given["discovery"].clusters]
    content, page = written(
        tmp_path,
        survive=survive,
        classnames=[f"{HOSTILE}{i}" for i in range(3)],
        title=HOSTILE,
        facts={HOSTILE: HOSTILE, "b": '"><b>'},
        images=[f'{HOSTILE}"/{HOSTILE.replace("/", "")}{i}">.png' for i in range(30)],
        regions=dataclasses.replace(regions, names=["", HOSTILE] * 30),
        discovery=dataclasses.replace(given["discovery"], clusters=tuple(clusters)),
    )
    tree = Tree(page)
    assert [tag for tag, _ in tree.elements] == [tag for tag, _ in plain]
    assert [set(attributes) for _, attributes in tree.elements] == [set(attributes) for _, attributes in plain]
    for tag in ("h1", "title", "dt", "dd"):
        assert HOSTILE in [text for tags, text in tree.texts if tags[-1:] == (tag,)]
    first = content["clusters"][0]["regions"][0]
    image = tree.all("img")[0]
    assert image["title"] == first["image"] and image["alt"].startswith(f"{Path(first['image']).name}, is {HOSTILE}")
    for words in (
        f"“{HOSTILE}2” is right 100 % of the time",
        f"Did not survive: {HOSTILE}",
        f"The annotation names among all 15: “{HOSTILE}” (15).",
        f"is {HOSTILE}{first['true'][-1]} ",
        f"said {HOSTILE}{first['predicted'][-1]} ",
        f"{'Tied to' if survive else 'Helps'} “{HOSTILE}2”",
    ):
        assert words in tree.text
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
