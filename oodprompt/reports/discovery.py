"""What discovery leaves behind: discovery.json, discovery.md, discovery.html (a gallery) and discovery.png.

The json is made first; the table, the page and the figure are drawn from it, so all four show the same numbers.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from oodprompt.discovery.result import Cluster, Discovery, precision_at
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.regions.boxes import Regions
from oodprompt.reports.style import BLUE, GREY, RED, markdown_table, write_figure

FILE = "discovery.json"
_FORMAT, _VERSION = "oodprompt discovery", 1
_REQUIRED = {
    "title": str,
    "facts": dict,
    "classnames": list,
    "num_images": int,
    "num_regions": int,
    "accuracy": (int, float),
    "clustering": dict,
    "clusters": list,
    "extra": dict,
}
_REQUIRED_OF_CLUSTERING = ["k", "silhouette", "silhouettes", "objective", "medoids", "assignment", "owner"]
_REQUIRED_OF_CLUSTER = ["index", "survives", "reason", "score", "influence", "helps", "hurts", "num_regions"]
_REQUIRED_OF_CLUSTER += ["num_images", "precision_at_10", "names", "classes", "medoid", "regions", "harm"]

_EXAMPLES = 6  # images of harm, of each kind
_CARDS = 12  # clusters shown in full on the page
_NEAREST = 3  # those shown when nothing survives
_LISTED = 20  # clusters with pictures among those that did not survive
_CLASSES = 14  # classes in one chart
_SMALL = 64  # images up to this side in pixels are not shrunk, and enlarged pixel by pixel
_SIDES = (176, 136, 104)  # of thumbnails of larger images, the next where the page would be too large
_STRIP = 96  # of thumbnails of clusters that did not survive
_LARGEST = 2_900_000  # page, in bytes
_WIDTH, _PITCH_X, _PITCH_Y = 12.5, 1.72, 1.95  # of the figure, and from one picture in it to the next, in inches


# ---- the content ----------------------------------------------------------------------------------------------------


def write_discovery(
    discovery: Discovery,
    regions: Regions,
    images: Sequence[str],
    label: np.ndarray,
    predicted: np.ndarray,
    classnames: Sequence[str],
    load: Callable[[int], Image.Image],
    directory: str | Path,
    *,
    title: str,
    facts: dict[str, str],
    top: int = 12,
    truth: np.ndarray | None = None,
    extra: dict[str, Any] | None = None,
    pictures: bool = True,
) -> list[Path]:
    """Write ``discovery.json``, ``discovery.md`` and, with ``pictures``, ``discovery.html`` and ``discovery.png``.

    Returns their paths.

    ``images`` [n] are the paths of the split's images, ``label`` [n] and ``predicted`` [n] their true and predicted
    classes (indices into ``classnames``); ``load(i)`` gives image i as the model sees it, whose fractions
    ``regions.boxes`` are of. ``facts`` are shown as they are (model, data set, K range, threshold ...). Of each
    cluster the ``top`` regions nearest to the medoid are kept and drawn. ``truth`` [r] says which regions carry a
    planted feature, for Precision@10 = share of a cluster's first 10 regions that do. ``extra`` goes into the json;
    arrays become lists, and what is not finite becomes null.

    Raises ``UserError`` when an image cannot be read or a file not written, ``ValueError`` when lengths differ.
    """
    label, predicted = np.asarray(label), np.asarray(predicted)
    n, r = len(images), len(regions.owner)
    if not (len(label) == len(predicted) == n and len(regions.boxes) == len(discovery.clustering.assignment) == r):
        raise ValueError("images, label and predicted, or boxes, owner and assignment, differ in length")
    if truth is not None and len(truth) != r:
        raise ValueError(f"truth is of {len(truth)} regions, there are {r}")
    describe = _Describe(regions, [str(path) for path in images], label, predicted, classnames, truth)
    clustering = discovery.clustering
    content = {
        "title": title,
        "facts": facts,
        "classnames": classnames,
        "num_images": n,
        "num_regions": r,
        "accuracy": float((label == predicted).mean()),
        "clustering": {
            "k": len(clustering.medoids),
            "silhouette": clustering.silhouette,
            "silhouettes": [[k, value] for k, value in sorted(clustering.silhouettes.items())],
            "objective": clustering.objective,
            "medoids": clustering.medoids,
            "assignment": clustering.assignment,
            "owner": regions.owner,
        },
        "clusters": [describe.cluster(cluster, top) for cluster in discovery.clusters],
        "extra": extra or {},
    }
    content = _plain({"format": _FORMAT, "version": _VERSION} | content)
    directory = Path(directory)
    files = [directory / name for name in (FILE, "discovery.md")]
    write_atomically(files[0], _json(content))
    write_atomically(files[1], _markdown(content))
    if pictures:
        shown = _Pictures(load, images)
        files += [directory / name for name in ("discovery.html", "discovery.png")]
        write_atomically(files[2], _page(content, shown))
        write_figure(_figure(content, shown), files[3])
    return files


class _Describe:
    """Turns clusters into what the json holds of them."""

    def __init__(
        self,
        regions: Regions,
        images: Sequence[str],
        label: np.ndarray,
        predicted: np.ndarray,
        classnames: Sequence[str],
        truth: np.ndarray | None,
    ) -> None:
        self.boxes, self.owner = np.asarray(regions.boxes), np.asarray(regions.owner)
        self.names, self.images, self.classnames = regions.names, images, classnames
        self.label, self.predicted = label, predicted
        self.truth = None if truth is None else np.asarray(truth, dtype=bool)

    def image(self, index: int) -> dict[str, Any]:
        true, predicted = self.classnames[self.label[index]], self.classnames[self.predicted[index]]
        return {"image": self.images[index], "index": int(index), "true": true, "predicted": predicted}

    def region(self, region: int) -> dict[str, Any]:
        row = self.image(self.owner[region])
        row |= {"region": int(region), "box": [round(float(side), 6) for side in self.boxes[region]]}
        if self.truth is not None:
            row["planted"] = bool(self.truth[region])
        if self.names:
            row["name"] = self.names[region]
        return row

    def cluster(self, cluster: Cluster, top: int) -> dict[str, Any]:
        regions = cluster.regions
        name = self.classnames.__getitem__
        named = Counter(self.names[r] for r in regions if self.names[r]) if self.names else Counter()
        return {
            "index": cluster.index,
            "survives": cluster.survives,
            "reason": cluster.reason,
            "score": cluster.score,
            "influence": cluster.influence,
            "helps": None if cluster.helps is None else name(cluster.helps),
            "hurts": [name(y) for y in cluster.hurts],
            "num_regions": len(regions),
            "num_images": len(np.unique(self.owner[regions])),
            "precision_at_10": None if self.truth is None else precision_at(regions, self.truth),
            "names": dict(named.most_common(5)),
            "classes": [
                {"class": name(g.label), "label": g.label, "p_in": g.p_in, "n_in": g.n_in, "p_out": g.p_out}
                | {"n_out": g.n_out, "weight": g.weight, "gap": g.gap}
                for g in sorted(cluster.gaps, key=lambda g: -g.gap)
            ],
            "medoid": self.region(cluster.medoid),
            "regions": [
                self.region(r) | {"similarity": round(float(s), 6)}
                for r, s in zip(regions[:top], cluster.similarity[:top], strict=True)
            ],
            "harm": {"hurt": self.hurt(cluster), "helped": self.helped(cluster)},
        }

    def hurt(self, cluster: Cluster) -> list[dict[str, Any]]:
        """Mispredicted images of the most hurt class that have the cluster, those with the most typical region first."""
        if not cluster.hurts:
            return []
        wrong = (self.label == cluster.hurts[0]) & (self.predicted != self.label)
        first = {int(self.owner[r]): r for r in cluster.regions[::-1] if wrong[self.owner[r]]}
        return [self.region(r) for r in list(first.values())[::-1][:_EXAMPLES]]

    def helped(self, cluster: Cluster) -> list[dict[str, Any]]:
        """Images of the helped class without the cluster: wrong ones from all over the split, then right ones."""
        if cluster.helps is None:
            return []
        without = self.label == cluster.helps
        without[self.owner[cluster.regions]] = False
        right = self.predicted == self.label
        wrong_ones, right_ones = np.flatnonzero(without & ~right), np.flatnonzero(without & right)
        spread = np.linspace(0, max(len(wrong_ones) - 1, 0), min(_EXAMPLES, len(wrong_ones))).astype(int)
        return [self.image(i) for i in [*wrong_ones[spread], *right_ones][:_EXAMPLES]]


def _plain(value: Any) -> Any:
    """What JSON can hold: arrays as lists, what is not finite as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(content: dict[str, Any]) -> str:
    """One line per key, and per element of a list of objects: long lists stay compact, the file can be read."""

    def line(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n    " + ",\n    ".join(line(item) for item in value) + "\n  ]"
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    return "{\n" + ",\n".join(f"  {line(key)}: {line(value)}" for key, value in content.items()) + "\n}\n"


def read_discovery(path: str | Path) -> dict[str, Any]:
    """What ``write_discovery`` wrote to ``discovery.json``; ``path`` is the file or its folder.

    Keys: title, facts, classnames, num_images, num_regions, accuracy; ``clustering`` with k, silhouette, silhouettes
    (pairs of K and value), objective, medoids [k], assignment [r], owner [r]; ``clusters``, survivors first, each with
    its G_c (``score``) and H_c (``influence``, None where no error can be laid to it), its accuracies by class, regions
    and examples of harm; and ``extra``.

    Raises ``UserError`` when the file is missing, broken, something else, or of a later version.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    again = "run discovery again to make it"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: name a folder in which discovery ran, or {again}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is broken ({error}): {again}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise UserError(f"{path} is not what discovery writes: give its {FILE}")
    if content.get("version") != _VERSION:
        found = content.get("version")
        raise UserError(
            f"{path} is of format version {found}, this release reads {_VERSION}: {again} with this release"
        )
    missing = [key for key, kind in _REQUIRED.items() if not isinstance(content.get(key), kind)]
    if not missing:
        missing = [f"clustering.{key}" for key in _REQUIRED_OF_CLUSTERING if key not in content["clustering"]]
        missing += [
            f"clusters[{i}].{key}"
            for i, cluster in enumerate(content["clusters"])
            for key in _REQUIRED_OF_CLUSTER
            if not isinstance(cluster, dict) or key not in cluster
        ]
    if missing:
        raise UserError(f"{path} is broken (no usable {missing[0]!r}): {again}")
    return content


# ---- words and numbers ----------------------------------------------------------------------------------------------


def _share(value: float) -> str:
    """A fraction in per cent, whole unless that would round to all or nothing."""
    percent = 100 * value
    if percent in (0, 100) or 0.5 < percent < 99.5:
        return f"{percent:.0f} %"
    return f"{min(max(percent, 0.1), 99.9):.1f} %"


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}".replace("-", "−")


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−") if abs(value) >= 0.005 else "0.00"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _listing(words: Sequence[str], most: int = 8) -> str:
    """a, b and c; of more than ``most``, how many others."""
    words = list(words) if len(words) <= most else [*words[:most], f"{len(words) - most} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + f" and {words[-1]}"


def _survivors(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster for cluster in content["clusters"] if cluster["survives"]]


def _dropped(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster for cluster in content["clusters"] if not cluster["survives"]]


def _row(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in cluster["classes"] if row["class"] == name)


def _verdict(content: dict[str, Any]) -> str:
    survivors, all_ = _survivors(content), content["clusters"]
    if not all_:
        return "No cluster was found."
    if not survivors:
        return (
            f"None of the {_count(len(all_), 'cluster')} survives the filters. That is a normal outcome: no "
            "group of regions passes every test of a shortcut that the model has learned."
        )
    verb = "survives" if len(survivors) == 1 else "survive"
    text = f"{len(survivors)} of {_count(len(all_), 'cluster')} {verb} the filters."
    if survivors[0]["helps"] is not None:
        text += f" The strongest is tied to “{survivors[0]['helps']}”."
    return text


def discovery_table(content: dict[str, Any], near: int = 3) -> str:
    """A table in Markdown: every surviving cluster, and the ``near`` best that did not survive, with the reason.

    ``content`` is what ``read_discovery`` gives. Columns "helps" and "hurts most" hold the accuracy (number of images)
    of that class with and without the cluster.
    """

    def effect(cluster: dict[str, Any], name: str | None) -> str:
        if name is None:
            return "-"
        row = _row(cluster, name)
        return f"{name}: {_share(row['p_in'])} ({row['n_in']:,}) / {_share(row['p_out'])} ({row['n_out']:,})"

    header = [
        "cluster",
        "G",
        "H",
        "regions",
        "images",
        "helps (with / without)",
        "hurts most (with / without)",
        "result",
    ]
    rows = [
        [
            c["index"],
            _number(c["score"]),
            _number(c["influence"]),
            f"{c['num_regions']:,}",
            f"{c['num_images']:,}",
            effect(c, c["helps"]),
            effect(c, next(iter(c["hurts"]), None)),
            "survives" if c["survives"] else f"dropped: {c['reason']}",
        ]
        for c in _survivors(content) + _dropped(content)[:near]
    ]
    if any(c["precision_at_10"] is not None for c in content["clusters"]):
        header.insert(-1, "Precision@10")
        for row, c in zip(rows, _survivors(content) + _dropped(content)[:near], strict=True):
            row.insert(-1, _number(c["precision_at_10"]))
    return markdown_table(header, rows)


def _markdown(content: dict[str, Any]) -> str:
    parts = [f"# {content['title']}\n", _verdict(content) + "\n"]
    if content["clusters"]:
        parts += [discovery_table(content) + "\n"]
    parts += ["G: performance gap, H: influence; the gallery is discovery.html.\n"]
    parts += ["## How it was made\n", markdown_table(("", ""), _made(content))]
    return "\n".join(parts) + "\n"


def _made(content: dict[str, Any]) -> list[tuple[str, str]]:
    clustering = content["clustering"]
    return [(str(key), str(value)) for key, value in content["facts"].items()] + [
        ("images, regions", f"{content['num_images']:,}, {content['num_regions']:,}"),
        ("clusters (K)", str(clustering["k"])),
        ("mean silhouette", _number(clustering["silhouette"])),
        ("sum of distances to the medoids", _number(clustering["objective"])),
    ]


# ---- pictures -------------------------------------------------------------------------------------------------------


class _Pictures:
    """The images that are shown, each read once."""

    def __init__(self, load: Callable[[int], Image.Image], images: Sequence[str]) -> None:
        self._load, self._images = load, images
        self.side = _SIDES[0]
        self.image = cache(self.image)
        self.data_uri = cache(self.data_uri)

    def image(self, index: int) -> Image.Image:
        try:
            return self._load(index).convert("RGB")
        except OSError as error:
            raise UserError(f"cannot read {self._images[index]} for the gallery: {error}; restore the image") from error

    def is_small(self, index: int) -> bool:
        return max(self.image(index).size) <= _SMALL

    def data_uri(self, index: int, side: int) -> str:
        """Larger images as thumbnails of ``side``; small ones in their size, losslessly where it is the first side."""
        image, buffer = self.image(index), io.BytesIO()
        lossless = self.is_small(index) and side == _SIDES[0]
        if lossless:
            image.save(buffer, "PNG", optimize=True)
        elif self.is_small(index):
            fine = side == _SIDES[1]
            image.save(buffer, "JPEG", quality=90 if fine else 75, subsampling=0 if fine else 2, optimize=True)
        else:
            image = image.copy()
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
            image.save(buffer, "JPEG", quality=80, optimize=True)
        kind = "png" if lossless else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- the page -------------------------------------------------------------------------------------------------------


class _Html(str):
    """Markup; any other text is escaped when it becomes part of an element."""


_VOID = {"img", "meta", "link"}


def _tag(name: str, /, *children: str | None, **attributes: str | int | bool | None) -> _Html:
    """An element. Attribute names lose a last ``_`` and write ``-`` for ``_``; None and False leave one out."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None and value is not False:
            key = key.rstrip("_").replace("_", "-")
            parts.append(key if value is True else f'{key}="{html.escape(str(value))}"')
    return _Html(f"<{' '.join(parts)}>" + (_join(children) if name in _VOID else f"{_join(children)}</{name}>"))


def _join(children: Iterable[str | None]) -> _Html:
    return _Html("".join(c if isinstance(c, _Html) else html.escape(c) for c in children if c is not None))


def _unseen(text: str) -> _Html:
    """For screen readers alone."""
    return _tag("span", text, class_="unseen")


def _page(content: dict[str, Any], pictures: _Pictures) -> str:
    """The page with the largest thumbnails that keep it small enough to send."""
    for side in _SIDES:
        pictures.side = side
        page = _page_of(content, pictures)
        if len(page.encode()) <= _LARGEST:
            break
    return page


def _page_of(content: dict[str, Any], pictures: _Pictures) -> str:
    survivors, dropped = _survivors(content), _dropped(content)
    cards, rest = (survivors, dropped) if survivors else (dropped[:_NEAREST], dropped[_NEAREST:])
    shown = cards[:_CARDS]
    main = [_head(content)]
    if survivors and len(shown) > 1:
        main.append(_contents(shown))
    if not survivors and shown:
        main.append(_tag("h2", "Nearest candidates", class_="section"))
    main += [_card(cluster, place, pictures) for place, cluster in enumerate(shown, 1)]
    if len(cards) > _CARDS:
        more = f"{_count(len(cards) - _CARDS, 'further cluster')} that survived: see discovery.md and {FILE}."
        main.append(_tag("p", more, class_="muted"))
    main += [_fold_dropped(rest, pictures, bool(survivors)), _fold_silhouettes(content), _fold_meaning(content)]
    main.append(_fold("How this was made", _facts(_made(content)), open_=False))
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("meta", name="color-scheme", content="light dark"),
        _tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _tag("link", rel="icon", href="data:,"),
        _tag("title", content["title"]),
        _tag("style", _Html(_STYLE)),
    )
    body = _tag("body", _tag("main", *main))
    return f"<!doctype html>\n{_tag('html', head, body, lang='en')}\n"


def _head(content: dict[str, Any]) -> _Html:
    tiles = [
        ("images", f"{content['num_images']:,}"),
        ("accuracy", _share(content["accuracy"])),
        ("regions", f"{content['num_regions']:,}"),
        ("clusters", f"{len(content['clusters']):,}"),
        ("survive", f"{len(_survivors(content)):,}"),
    ]
    first = next(iter(_survivors(content)), None)
    if first is not None and first["precision_at_10"] is not None:
        tiles.append(("Precision@10", _number(first["precision_at_10"])))
    intro = (
        "Regions of images that look alike to the model were put into clusters. A cluster survives when its presence "
        "goes with right answers for one class and wrong ones for another: a sign that the model has learned it "
        "as a shortcut."
    )
    return _tag(
        "header",
        _tag("h1", content["title"]),
        _tag("p", _verdict(content), class_="verdict"),
        _tag("p", intro, class_="muted"),
        _tiles(tiles),
        class_="top",
    )


def _tiles(tiles: Iterable[tuple[str, str]]) -> _Html:
    return _tag("dl", *(_tag("div", _tag("dt", k), _tag("dd", v)) for k, v in tiles), class_="tiles")


def _facts(facts: Iterable[tuple[str, str]]) -> _Html:
    return _tag("dl", *(_tag("div", _tag("dt", key), _tag("dd", value)) for key, value in facts), class_="facts")


def _contents(clusters: Sequence[dict[str, Any]]) -> _Html:
    links = []
    for place, cluster in enumerate(clusters, 1):
        numbers = f" cluster {cluster['index']}, G {_number(cluster['score'])}"
        name = _tag("b", f"{place}. {_headline(cluster)}")
        links.append(_tag("li", _tag("a", name, numbers, href=f"#c{cluster['index']}")))
    return _tag("nav", _tag("ol", *links), aria_label="Clusters")


def _headline(cluster: dict[str, Any]) -> str:
    if cluster["helps"] is None:
        return "Helps no class"
    return f"{'Tied to' if cluster['survives'] else 'Helps'} “{cluster['helps']}”"


def _card(cluster: dict[str, Any], place: int, pictures: _Pictures) -> _Html:
    tiles = [("gap G", _number(cluster["score"])), ("influence H", _number(cluster["influence"]))]
    if cluster["precision_at_10"] is not None:
        tiles.append(("Precision@10", _number(cluster["precision_at_10"])))
    found = f"{_count(cluster['num_regions'], 'region')} in {_count(cluster['num_images'], 'image')}"
    identity = f"c{cluster['index']}"
    heading = _tag(
        "header",
        _tag(
            "div",
            _tag("p", f"{place} · cluster {cluster['index']} · {found}", class_="muted"),
            _tag("h2", _headline(cluster), id=f"{identity}-name"),
        ),
        _tiles(tiles),
    )
    dropped = None
    if not cluster["survives"]:
        dropped = _tag("p", _tag("b", "Did not survive: "), cluster["reason"], class_="reason")
    regions = _tag(
        "section",
        _tag("h3", f"Its {_count(len(cluster['regions']), 'most typical region')}"),
        _named(cluster),
        _gallery(_shown(row, pictures, cluster["index"]) for row in cluster["regions"]),
    )
    return _tag(
        "article",
        heading,
        dropped,
        _effects(cluster),
        _tag("div", regions, _chart(cluster), class_="halves"),
        _harm(cluster, pictures),
        id=identity,
        aria_labelledby=f"{identity}-name",
    )


def _named(cluster: dict[str, Any]) -> _Html | None:
    if not cluster["names"]:
        return None
    named = _listing([f"“{name}” ({count:,})" for name, count in cluster["names"].items()])
    return _tag("p", f"The annotation names among all {cluster['num_regions']:,}: {named}.", class_="muted")


def _effects(cluster: dict[str, Any]) -> _Html:
    """Which class the cluster helps and which it hurts, in a sentence each."""

    def sentence(name: str) -> list[str]:
        row = _row(cluster, name)
        strong = _tag("strong", f"“{name}” is right {_share(row['p_in'])} of the time")
        images = f" ({_count(row['n_in'], 'image')}); without it "
        return [
            "Where this is present, ",
            strong,
            images,
            _tag("strong", _share(row["p_out"])),
            f" ({row['n_out']:,}).",
        ]

    items = []
    if cluster["helps"] is not None:
        items.append(_tag("li", _tag("b", "▲ helps", class_="helps"), " ", *sentence(cluster["helps"])))
    if cluster["hurts"]:
        items.append(_tag("li", _tag("b", "▼ hurts", class_="hurts"), " ", *sentence(cluster["hurts"][0])))
    if len(cluster["hurts"]) > 1:
        also = _listing([f"“{name}”" for name in cluster["hurts"][1:]])
        items.append(_tag("li", _tag("b", "▼ hurts", class_="hurts"), f" also {also}."))
    if not items:
        items.append(_tag("li", "No class differs between images with it and without."))
    return _tag("ul", *items, class_="effects")


def _gallery(figures: Iterable[_Html]) -> _Html:
    return _tag("div", *figures, class_="gallery")


def _shown(row: dict[str, Any], pictures: _Pictures, cluster: int | None = None) -> _Html:
    """An image, its region outlined over the dimmed rest (if there is one), and what it is and is taken for."""
    right = row["true"] == row["predicted"]
    picture = _picture(row, pictures, cluster)
    mark = ("✓", "right") if right else ("✗", "wrong")
    answer = _tag("span", _tag("span", mark[0], aria_hidden="true"), _unseen(mark[1]), " ", class_=f"mark {mark[1]}")
    lines = [_tag("span", "is ", _tag("b", row["true"]), class_="line")]
    lines.append(_tag("span", answer, "said ", _tag("b", row["predicted"]), class_=f"line {mark[1]}"))
    if "similarity" in row and "planted" in row:
        lines.append(_tag("span", "◆ planted" if row["planted"] else "◇ not planted", class_="line muted"))
    return _tag("figure", picture, _tag("figcaption", *lines), class_=mark[1])


def _picture(row: dict[str, Any], pictures: _Pictures, cluster: int | None = None, side: int | None = None) -> _Html:
    index, box = row["index"], row.get("box")
    width, height = pictures.image(index).size
    alt = f"{Path(row['image']).name}, is {row['true']}, said {row['predicted']}"
    if box:
        left, top, right, bottom = (_share(side) for side in box)
        of = "the region" if cluster is None else f"the region of cluster {cluster}"
        alt += f"; {of} spans {left} to {right} from the left, {top} to {bottom} from the top"
    small = pictures.is_small(index)
    image = _tag(
        "img",
        src=pictures.data_uri(index, pictures.side if small or side is None else side),
        alt=alt,
        title=row["image"],
        width=width,
        height=height,
        class_="pixels" if small else None,
    )
    return _tag("div", image, _outline(box) if box else None, class_="picture")


def _outline(box: Sequence[float]) -> _Html:
    """The rest of the image dimmed, the box in a line that stands out from dark and light."""
    left, top, right, bottom = (f"{100 * side:.4g}" for side in box)
    inner = f"M{left} {top}H{right}V{bottom}H{left}Z"
    return _tag(
        "svg",
        _tag("path", d=f"M0 0H100V100H0Z{inner}", fill_rule="evenodd", class_="dim"),
        _tag("path", d=inner, class_="edge"),
        _tag("path", d=inner, class_="box"),
        viewBox="0 0 100 100",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def _chart(cluster: dict[str, Any]) -> _Html:
    """Accuracy of each class with and without the cluster, as bars in a table."""
    rows = _charted(cluster, _CLASSES)
    if not rows:
        return _tag(
            "section", _tag("h3", "Accuracy by class"), _tag("p", "No class has images both with and without it.")
        )
    head = _tag(
        "tr",
        _tag("th", "class", scope="col"),
        _tag("th", "accuracy", scope="col"),
        _tag("th", "of images", scope="col"),
        _tag("th", "gap", scope="col"),
    )
    legend = _tag(
        "p",
        _tag("span", class_="key with"),
        "with the cluster ",
        _tag("span", class_="key without"),
        "without",
        class_="muted legend",
    )
    more = len(cluster["classes"]) - len(rows)
    note = _tag("p", f"{_count(more, 'class') if more == 1 else f'{more:,} classes'} with smaller gaps left out.")
    return _tag(
        "section",
        _tag("h3", "Accuracy by class"),
        legend,
        _tag("table", _tag("thead", head), _tag("tbody", *(_class_row(row) for row in rows))),
        note if more else None,
        class_="chart",
    )


def _charted(cluster: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The classes with the largest gaps, by falling gap."""
    rows = sorted(cluster["classes"], key=lambda row: -abs(row["gap"]))[:most]
    return sorted(rows, key=lambda row: -row["gap"])


def _class_row(row: dict[str, Any]) -> _Html:
    def bar(y: int, value: float, kind: str) -> _Html:
        return _join(
            (
                _tag("rect", x="0", y=y, width="100%", height="9", rx="2", class_="track"),
                _tag("rect", x="0", y=y, width=f"{100 * value:.4g}%", height="9", rx="2", class_=kind),
            )
        )

    bars = _tag("svg", bar(3, row["p_in"], "with"), bar(19, row["p_out"], "without"), height="32", aria_hidden="true")

    def value(words: str, share: float, number: int) -> _Html:
        return _tag("span", _unseen(words), _tag("b", _share(share)), f" of {number:,}", class_="line")

    numbers = (value("with: ", row["p_in"], row["n_in"]), value("without: ", row["p_out"], row["n_out"]))
    kind = "hurts" if row["gap"] < 0 else "helps" if row["gap"] > 0 else None
    return _tag(
        "tr",
        _tag("th", row["class"], scope="row"),
        _tag("td", bars, class_="bars"),
        _tag("td", *numbers, class_="numbers"),
        _tag("td", _signed(row["gap"]), class_=f"gap {kind or ''}".strip()),
    )


def _harm(cluster: dict[str, Any], pictures: _Pictures) -> _Html | None:
    hurt, helped = cluster["harm"]["hurt"], cluster["harm"]["helped"]
    parts = []
    if hurt:
        row = _row(cluster, cluster["hurts"][0])
        text = f"“{row['class']}” with it: right {_share(row['p_in'])} of {_count(row['n_in'], 'image')}"
        figures = (_shown(example, pictures, cluster["index"]) for example in hurt)
        parts.append(_tag("section", _tag("h4", text), _gallery(figures)))
    if helped:
        row = _row(cluster, cluster["helps"])
        text = f"“{row['class']}” without it: right {_share(row['p_out'])} of {_count(row['n_out'], 'image')}"
        parts.append(_tag("section", _tag("h4", text), _gallery(_shown(example, pictures) for example in helped)))
    if not parts:
        return None
    return _tag("section", _tag("h3", "What it costs"), _tag("div", *parts, class_="halves even"), class_="harm")


def _fold(summary: str, *children: str | None, open_: bool = False) -> _Html:
    return _tag("details", _tag("summary", summary), *children, open=open_)


def _fold_dropped(clusters: Sequence[dict[str, Any]], pictures: _Pictures, survivors: bool) -> _Html | None:
    if not clusters:
        return None

    def item(cluster: dict[str, Any]) -> _Html:
        thumbs = (_picture(row, pictures, cluster["index"], _STRIP) for row in cluster["regions"][:3])
        numbers = f"cluster {cluster['index']} · G {_number(cluster['score'])} · H {_number(cluster['influence'])}"
        found = f"{_count(cluster['num_regions'], 'region')} in {_count(cluster['num_images'], 'image')}"
        words = [_tag("b", numbers), _tag("span", f"Did not survive: {cluster['reason']}", class_="line")]
        helps = "" if cluster["helps"] is None else f" · helps “{cluster['helps']}”"
        words.append(_tag("span", found + helps, class_="line muted"))
        return _tag("li", _tag("div", *thumbs, class_="strip"), _tag("div", *words))

    further = len(clusters) - _LISTED
    return _fold(
        f"{_count(len(clusters), 'cluster' if survivors else 'further cluster')} that did not survive, and why",
        _tag("ul", *(item(cluster) for cluster in clusters[:_LISTED]), class_="dropped"),
        _tag("p", f"{_count(further, 'further one')} in {FILE}.", class_="muted") if further > 0 else None,
    )


def _fold_silhouettes(content: dict[str, Any]) -> _Html | None:
    clustering = content["clustering"]
    points = [(k, value) for k, value in clustering["silhouettes"] if value is not None]
    if not points:
        return None
    text = (
        f"K-medoids was run for {_listing([str(k) for k, _ in points], 4) if len(points) < 5 else _range(points)}; "
        f"K = {clustering['k']} has the highest mean silhouette, {_number(clustering['silhouette'])}."
    )
    return _fold("How many clusters", _tag("p", text), _curve(points, clustering["k"]) if len(points) > 1 else None)


def _range(points: Sequence[tuple[int, float]]) -> str:
    return f"{len(points)} values of K from {points[0][0]} to {points[-1][0]}"


def _curve(points: Sequence[tuple[int, float]], chosen: int) -> _Html:
    """The mean silhouette by K as a line, the chosen K marked."""
    ks, values = [k for k, _ in points], [value for _, value in points]
    low, high = min(values), max(values)
    span = (high - low) or 1.0

    def place(k: int, value: float) -> tuple[str, str]:
        return f"{46 + 300 * (k - ks[0]) / (ks[-1] - ks[0]):.1f}", f"{130 - 105 * (value - low) / span:.1f}"

    line = " ".join(",".join(place(k, value)) for k, value in points)
    marks = []
    if chosen in ks:
        x, y = place(chosen, values[ks.index(chosen)])
        marks = [
            _tag("line", x1=x, x2=x, y1=y, y2="138", class_="guide"),
            _tag("circle", cx=x, cy=y, r="4.5", class_="with"),
            _tag("text", f"K = {chosen}", x=x, y=f"{float(y) - 9:.1f}", text_anchor=_anchor(float(x))),
        ]
    return _tag(
        "svg",
        _tag("path", d="M46 18V138H346", class_="axis"),
        *(
            _tag("text", _number(value), x="41", y=f"{float(place(ks[0], value)[1]) + 4:.1f}", text_anchor="end")
            for value in dict.fromkeys((low, high))
        ),
        *(_tag("text", str(k), x=place(k, low)[0], y="153", text_anchor="middle") for k in (ks[0], ks[-1])),
        _tag("text", "K", x="196", y="153", text_anchor="middle"),
        _tag("polyline", points=line, class_="curve"),
        *marks,
        viewBox="0 0 360 160",
        class_="silhouettes",
        role="img",
        aria_label=f"Mean silhouette by K: {_number(low)} to {_number(high)}, highest at K = {chosen}",
    )


def _anchor(x: float) -> str:
    return "end" if x > 310 else "start" if x < 80 else "middle"


def _fold_meaning(content: dict[str, Any]) -> _Html:
    sentences = [
        "A cluster is a set of regions that look alike to the model; an image has it when one of its regions is in it.",
        "The gap of a class is its accuracy with the cluster less its accuracy without, times w = 2 min(n with, n "
        "without) / (n with + n without), so that lopsided counts weigh little; G is the sum of the gaps' sizes over "
        "classes, from 0 to the number of classes.",
        "H is measured on the wrong images that have the cluster: the share of them, in the class where it is largest, "
        "whose best region for the wrong answer is the cluster's; none means that there is no such image.",
    ]
    if any(cluster["precision_at_10"] is not None for cluster in content["clusters"]):
        sentences.append("Precision@10 is the share of a cluster's first 10 regions that carry the planted feature.")
    return _fold("What the numbers mean", *(_tag("p", sentence) for sentence in sentences))


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root{color-scheme:light dark;--back:#f3f4f7;--card:#fff;--text:#1c2128;--muted:#57606a;--line:#d9dee4;--with:#3465a4;
--without:#aab3bf;--track:#edf0f3;--good:#2b6a12;--bad:#b3261e;--badback:#fdecea;--link:#24508c}
@media (prefers-color-scheme:dark){:root{--back:#0f1216;--card:#181c22;--text:#e6e9ee;--muted:#9aa5b1;--line:#303843;
--with:#6fa3ea;--without:#76828f;--track:#242a32;--good:#8ecf6c;--bad:#ff8f85;--badback:#3a1d1c;--link:#9cc2f5}}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%;text-size-adjust:100%}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1180px;margin:0 auto;padding:28px 20px 60px}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .4em}h2{font-size:1.45rem;line-height:1.25;margin:0}
h3{font-size:1rem;margin:0 0 .5em}h4{font-size:.95rem;font-weight:600;margin:0 0 .6em}
h2.section{margin:30px 0 0}p{margin:0 0 .7em}a{color:var(--link)}
.verdict{font-size:1.2rem;font-weight:600}.muted{color:var(--muted)}.top>.muted{max-width:70ch}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
dl{margin:0}dd{margin:0}.tiles{display:flex;flex-wrap:wrap;gap:8px 26px}
.tiles div{display:flex;flex-direction:column-reverse}.tiles dt{color:var(--muted);font-size:.82rem;line-height:1.2}
.tiles dd{font-size:1.45rem;font-weight:650;line-height:1.2;font-variant-numeric:tabular-nums}
nav ol{list-style:none;display:flex;flex-wrap:wrap;gap:8px;margin:22px 0 0;padding:0}
nav a{display:block;padding:6px 12px;border:1px solid var(--line);border-radius:8px;background:var(--card);
text-decoration:none;font-size:.9rem}nav a:hover{border-color:var(--link)}
:focus-visible{outline:3px solid var(--with);outline-offset:2px}
article,details{background:var(--card);border:1px solid var(--line);border-radius:12px;margin-top:20px;padding:22px}
article{scroll-margin-top:12px}article>header{display:flex;flex-wrap:wrap;justify-content:space-between;gap:12px 30px}
article>header p{margin:0;font-size:.9rem}.reason{margin:12px 0 0;padding:8px 12px;border-left:4px solid var(--without);
background:var(--back)}
.effects{list-style:none;margin:14px 0 22px;padding:0}.effects li{margin:.25em 0}
.effects b.helps,.effects b.hurts{display:inline-block;min-width:4.6em}.helps{color:var(--good)}.hurts{color:var(--bad)}
.halves{display:grid;grid-template-columns:minmax(0,1.35fr) minmax(0,1fr);gap:30px}
.halves.even{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(124px,1fr));gap:14px}
.even .gallery{grid-template-columns:repeat(3,minmax(0,1fr))}
figure{margin:0;min-width:0}.picture{position:relative;border-radius:3px;line-height:0}
.picture img{width:100%;height:auto;display:block}.pixels{image-rendering:pixelated}
.picture svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.dim{fill:#000;fill-opacity:.5}.edge,.box{fill:none;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.edge{stroke:#000;stroke-width:5px}.box{stroke:#ffd93b;stroke-width:2.5px}
figcaption{font-size:.84rem;line-height:1.35;padding:6px 2px 0}.line{display:block}
span.wrong.line{color:var(--bad)}.mark.right{color:var(--good)}figcaption .wrong.line b{text-decoration:underline}
.harm{border-top:1px solid var(--line);margin-top:22px;padding-top:18px}
.legend{font-size:.85rem;margin:0 0 4px}.key{display:inline-block;width:1.6em;height:.6em;border-radius:2px;
margin-right:.4em;background:var(--with);print-color-adjust:exact;-webkit-print-color-adjust:exact}
.key.without{background:var(--without);margin-left:1em}
table{width:100%;border-collapse:collapse;font-size:.88rem}th{text-align:left;font-weight:600}
thead th{font-weight:400;color:var(--muted);font-size:.8rem}th,td{padding:3px 0;vertical-align:middle}
tbody tr{border-top:1px solid var(--line)}tbody th{padding-right:10px;min-width:5em}
.bars{width:42%;padding-right:10px}.bars svg{display:block;width:100%;min-width:56px}.track{fill:var(--track)}
rect.with,circle.with{fill:var(--with)}rect.without{fill:var(--without)}
.numbers{line-height:16px;font-size:.8rem;white-space:nowrap;padding-right:10px;font-variant-numeric:tabular-nums}
.gap{text-align:right;white-space:nowrap;font-weight:600;font-variant-numeric:tabular-nums}
thead th:last-child{text-align:right}
details{padding:0 22px}summary{cursor:pointer;font-weight:600;padding:14px 0}details[open]{padding-bottom:16px}
.dropped{list-style:none;margin:0;padding:0;display:grid;gap:14px 30px;
grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr))}
.dropped li{display:flex;gap:16px;align-items:center;font-size:.88rem;line-height:1.4}
.dropped li>div:last-child{min-width:0}.strip{display:grid;grid-template-columns:repeat(3,56px);gap:7px;flex:none}
.strip .box{stroke-width:1.8px}.strip .edge{stroke-width:3.5px}
.facts div{display:grid;grid-template-columns:minmax(9em,15em) 1fr;gap:4px 16px;padding:5px 0;
border-top:1px solid var(--line)}.facts dt{color:var(--muted)}
.silhouettes{width:100%;max-width:520px;display:block}.silhouettes text{font-size:11px;fill:var(--muted)}
.axis,.guide{fill:none;stroke:var(--line)}.guide{stroke-dasharray:3 3;stroke:var(--with)}
.curve{fill:none;stroke:var(--with);stroke-width:2;stroke-linejoin:round}
@media (max-width:820px){main{padding:20px 14px 40px}.halves,.halves.even{grid-template-columns:minmax(0,1fr)}
article,details{padding:16px}details{padding:0 16px}h1{font-size:1.5rem}.verdict{font-size:1.08rem}
.gallery,.even .gallery{grid-template-columns:repeat(auto-fill,minmax(94px,1fr));gap:12px}}
@media (max-width:480px){.dropped li{flex-direction:column;align-items:flex-start;gap:6px}
.facts div{grid-template-columns:1fr;gap:0}}
@media print{:root{--back:#fff;--card:#fff;--text:#000;--muted:#444;--line:#bbb;--with:#3465a4;--without:#aab3bf;
--track:#edf0f3;--good:#2b6a12;--bad:#b3261e;--link:#000}body{font-size:11pt}main{max-width:none;padding:0}nav{display:none}
article,details{border:0;border-top:1px solid #bbb;border-radius:0;padding:12px 0}figure,tr,li,.harm section{
break-inside:avoid}h2,h3,h4{break-after:avoid}.gallery,.even .gallery{grid-template-columns:repeat(6,1fr);gap:8px}
.halves{grid-template-columns:1fr}details::details-content{content-visibility:visible;block-size:auto}}
"""


# ---- the figure -----------------------------------------------------------------------------------------------------


def _figure(content: dict[str, Any], pictures: _Pictures, most: int = 4) -> Figure:
    """The first clusters (the nearest candidates when nothing survives): regions left, accuracy by class right."""
    clusters = (_survivors(content) or _dropped(content)[:_NEAREST])[:most]
    charts = [_charted(cluster, 10) for cluster in clusters]
    heights = [max(2 * _PITCH_Y, 0.9 + 0.34 * len(rows)) + 0.55 for rows in charts]
    height = sum(heights) + 0.85
    figure = Figure(figsize=(_WIDTH, height))
    figure.text(0.25 / _WIDTH, 1 - 0.38 / height, _short(content["title"], 100), fontsize=15, fontweight="bold")
    verdict = _verdict(content).split(". ")[0].rstrip(".")
    figure.text(0.25 / _WIDTH, 1 - 0.65 / height, _literal(verdict), fontsize=11)
    top = height - 0.85
    for cluster, chart, part in zip(clusters, charts, heights, strict=True):
        _draw_cluster(figure, cluster, chart, pictures, top)
        top -= part
    return figure


def _literal(text: str) -> str:
    return text.replace("$", r"\$")  # else two of them enclose a formula


def _short(name: str, most: int = 22) -> str:
    return _literal(name if len(name) <= most else f"{name[: most - 1]}…")


def _draw_cluster(
    figure: Figure, cluster: dict[str, Any], chart: Sequence[dict[str, Any]], pictures: _Pictures, top: float
) -> None:
    """Draw a cluster below ``top``, in inches from the bottom of the figure."""
    height = figure.get_figheight()

    def place(x: float, y: float, wide: float, high: float) -> tuple[float, float, float, float]:
        return x / _WIDTH, (top - y - high) / height, wide / _WIDTH, high / height

    words = [f"cluster {cluster['index']}", f"G {_number(cluster['score'])}", f"H {_number(cluster['influence'])}"]
    if cluster["helps"] is not None:
        words.append(f"helps “{_short(cluster['helps'])}”")
    if not cluster["survives"]:
        words.append(_short(f"dropped: {cluster['reason']}", 80))
    elif cluster["hurts"]:
        words.append("hurts " + _listing([f"“{_short(name)}”" for name in cluster["hurts"]], 3))
    figure.text(*place(0.25, 0.25, 0, 0)[:2], " · ".join(words), fontsize=10.5, fontweight="bold")
    for i, row in enumerate(cluster["regions"][:8]):
        corner = 0.25 + _PITCH_X * (i % 4), 0.42 + _PITCH_Y * (i // 4)
        axes = figure.add_axes(place(*corner, _PITCH_X - 0.2, _PITCH_X - 0.2), anchor="N")
        _draw_region(axes, row, pictures.image(row["index"]))
    if chart:
        _draw_bars(figure.add_axes(place(9.3, 0.65, _WIDTH - 9.6, 0.34 * len(chart))), chart)


def _draw_region(axes: Any, row: dict[str, Any], image: Image.Image) -> None:
    axes.axis("off")
    pixels = np.asarray(image, dtype=float) / 255
    height, width = pixels.shape[:2]
    left, top, right, bottom = row["box"]
    x, y = (np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height
    inside = ((x >= left) & (x < right))[None, :] & ((y >= top) & (y < bottom))[:, None]
    axes.imshow(
        np.where(inside[..., None], pixels, 0.5 * pixels),
        extent=(0, 1, 1, 0),
        aspect=height / width,
        interpolation="nearest" if max(image.size) <= _SMALL else "antialiased",
    )
    for colour, line in (("black", 3.5), ("#ffd93b", 1.8)):
        frame = Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=line)
        frame.set_clip_on(False)
        axes.add_patch(frame)
    is_right = row["true"] == row["predicted"]
    true, predicted = _short(row["true"], 18), _short(row["predicted"], 18)
    caption = f"{true} ✓" if is_right else f"{true}\nsaid {predicted} ✗"
    colour = "black" if is_right else RED
    axes.text(0.5, -0.04, caption, transform=axes.transAxes, ha="center", va="top", fontsize=8.5, color=colour)


def _draw_bars(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = np.arange(len(rows))
    for offset, p, n, colour, words in (
        (-0.2, "p_in", "n_in", BLUE, "with the cluster"),
        (0.2, "p_out", "n_out", GREY, "without"),
    ):
        bars = axes.barh(places + offset, [100 * row[p] for row in rows], 0.38, color=colour, label=words)
        labels = [f"{_share(row[p])} of {row[n]:,}" for row in rows]
        axes.bar_label(bars, labels=labels, padding=3, fontsize=7.5)
    axes.set_yticks(places, [f"{_short(row['class'])}  {_signed(row['gap'])}" for row in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 132)
    axes.set_xticks(range(0, 101, 25))
    axes.tick_params(labelsize=8.5)
    axes.set_xlabel("accuracy, % (beside each class: its gap)", fontsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8.5, borderpad=0)
