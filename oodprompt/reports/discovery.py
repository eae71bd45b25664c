"""What discovery leaves behind: discovery.json, discovery.md, discovery.html (a gallery) and discovery.png.

The json is made first. The table, the page and the figure are drawn from it, so all four show the same numbers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oodprompt.discovery.result import Cluster, Discovery, precision_at
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.log import optional
from oodprompt.regions.boxes import Regions
from oodprompt.reports.discovery_figure import discovery_figure
from oodprompt.reports.discovery_page import discovery_page
from oodprompt.reports.discovery_text import dropped, how_it_was_made, row_of_class, survivors, verdict
from oodprompt.reports.json_values import json_value
from oodprompt.reports.pictures import Pictures
from oodprompt.reports.style import draw, markdown_table, number, whole_percent

FILE = "discovery.json"
_FORMAT, _VERSION = "oodprompt discovery", 1
_REQUIRED: dict[str, type | tuple[type, ...]] = {
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


# ---- writing


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
    ``regions.boxes`` [r, 4] are of. ``facts`` are shown as they are (model, data set, K range, threshold ...). Of each
    cluster the ``top`` regions nearest to the medoid are kept and drawn. ``truth`` [r] says which regions carry a
    planted feature, for Precision@10 = share of a cluster's first 10 regions that do. ``extra`` goes into the json;
    arrays become lists, and what is not finite becomes null.

    Raises ``UserError`` when the json cannot be written, ``ValueError`` when lengths differ; a line says which other
    file could not be made.
    """
    paths = [str(path) for path in images]
    clusters = _Clusters(regions, paths, np.asarray(label), np.asarray(predicted), classnames, truth)
    if len(discovery.clustering.assignment) != len(regions.owner):
        raise ValueError("boxes, owner and assignment differ in length")
    content = _content(discovery, clusters, top, title, facts, extra or {})
    directory = Path(directory)
    files = [directory / FILE]
    write_atomically(files[0], _json(content))
    with optional("discovery.md"):
        write_atomically(directory / "discovery.md", _markdown(content))
        files.append(directory / "discovery.md")
    if pictures:
        shown = Pictures(load, paths)
        with optional("discovery.html"):
            write_atomically(directory / "discovery.html", discovery_page(content, shown))
            files.append(directory / "discovery.html")
        files += draw(directory / "discovery.png", lambda: discovery_figure(content, shown.image))
    return files


def _content(
    discovery: Discovery, clusters: _Clusters, top: int, title: str, facts: dict[str, str], extra: dict[str, Any]
) -> dict[str, Any]:
    """What ``discovery.json`` holds, see ``read_discovery``."""
    clustering = discovery.clustering
    return json_value(
        {
            "format": _FORMAT,
            "version": _VERSION,
            "title": title,
            "facts": facts,
            "classnames": clusters.classnames,
            "num_images": len(clusters.images),
            "num_regions": len(clusters.owner),
            "accuracy": float((clusters.label == clusters.predicted).mean()),
            "clustering": {
                "k": len(clustering.medoids),
                "silhouette": clustering.silhouette,
                "silhouettes": [[k, value] for k, value in sorted(clustering.silhouettes.items())],
                "objective": clustering.objective,
                "medoids": clustering.medoids,
                "assignment": clustering.assignment,
                "owner": clusters.owner,
            },
            "clusters": [clusters.entry(cluster, top) for cluster in discovery.clusters],
            "extra": extra,
        }
    )


class _Clusters:
    """Makes the json's entries of clusters, from the regions [r] and the images [n] of one split."""

    def __init__(
        self,
        regions: Regions,
        images: Sequence[str],
        label: np.ndarray,
        predicted: np.ndarray,
        classnames: Sequence[str],
        truth: np.ndarray | None,
    ) -> None:
        if not len(label) == len(predicted) == len(images):
            raise ValueError("images, label and predicted differ in length")
        if len(regions.boxes) != len(regions.owner):
            raise ValueError("boxes and owner of the regions differ in length")
        if truth is not None and len(truth) != len(regions.owner):
            raise ValueError(f"truth is of {len(truth)} regions, there are {len(regions.owner)}")
        self.boxes, self.owner = np.asarray(regions.boxes), np.asarray(regions.owner)
        self.names, self.images, self.classnames = regions.names, images, classnames
        self.label, self.predicted = label, predicted
        self.truth = None if truth is None else np.asarray(truth, dtype=bool)

    def entry(self, cluster: Cluster, top: int) -> dict[str, Any]:
        """One cluster, with its first ``top`` regions."""
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

    def image(self, index: int) -> dict[str, Any]:
        """An image, what it is and what it is taken for."""
        true, predicted = self.classnames[self.label[index]], self.classnames[self.predicted[index]]
        return {"image": self.images[index], "index": int(index), "true": true, "predicted": predicted}

    def region(self, region: int) -> dict[str, Any]:
        """A region and its image. The box is (left, top, right, bottom) in fractions of the image."""
        row = self.image(self.owner[region])
        row |= {"region": int(region), "box": [round(float(side), 6) for side in self.boxes[region]]}
        if self.truth is not None:
            row["planted"] = bool(self.truth[region])
        if self.names:
            row["name"] = self.names[region]
        return row

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
    missing = _first_missing(content)
    if missing:
        raise UserError(f"{path} is broken (no usable {missing!r}): {again}")
    return content


def _first_missing(content: dict[str, Any]) -> str:
    """The first part of the content that is not there or of another type; "" where nothing is missing."""
    missing = [key for key, kind in _REQUIRED.items() if not isinstance(content.get(key), kind)]
    if not missing:
        missing = [f"clustering.{key}" for key in _REQUIRED_OF_CLUSTERING if key not in content["clustering"]]
        missing += [
            f"clusters[{i}].{key}"
            for i, cluster in enumerate(content["clusters"])
            for key in _REQUIRED_OF_CLUSTER
            if not isinstance(cluster, dict) or key not in cluster
        ]
    return next(iter(missing), "")


# ---- the table


def discovery_table(content: dict[str, Any], near: int = 3) -> str:
    """A table in Markdown: every surviving cluster, and the ``near`` best that did not survive, with the reason.

    ``content`` is what ``read_discovery`` gives. Columns "helps" and "hurts most" hold the accuracy (number of images)
    of that class with and without the cluster.
    """

    def effect(cluster: dict[str, Any], name: str | None) -> str:
        if name is None:
            return "-"
        row = row_of_class(cluster, name)
        inside, outside = whole_percent(row["p_in"]), whole_percent(row["p_out"])
        return f"{name}: {inside} ({row['n_in']:,}) / {outside} ({row['n_out']:,})"

    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "cluster": lambda c: c["index"],
        "G": lambda c: number(c["score"]),
        "H": lambda c: number(c["influence"]),
        "regions": lambda c: f"{c['num_regions']:,}",
        "images": lambda c: f"{c['num_images']:,}",
        "helps (with / without)": lambda c: effect(c, c["helps"]),
        "hurts most (with / without)": lambda c: effect(c, next(iter(c["hurts"]), None)),
        "Precision@10": lambda c: number(c["precision_at_10"]),
        "result": lambda c: "survives" if c["survives"] else f"dropped: {c['reason']}",
    }
    if all(cluster["precision_at_10"] is None for cluster in content["clusters"]):
        del columns["Precision@10"]
    shown = survivors(content) + dropped(content)[:near]
    return markdown_table(list(columns), [[cell(c) for cell in columns.values()] for c in shown])


def _markdown(content: dict[str, Any]) -> str:
    parts = [f"# {content['title']}\n", verdict(content) + "\n"]
    if content["clusters"]:
        parts += [discovery_table(content) + "\n"]
    parts += ["G: performance gap, H: influence; the gallery is discovery.html.\n"]
    parts += ["## How it was made\n", markdown_table(("", ""), how_it_was_made(content))]
    return "\n".join(parts) + "\n"
