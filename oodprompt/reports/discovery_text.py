"""What the table, the page and the figure of a discovery share: which clusters they show, and the words for them.

``content`` is what ``discovery.read_discovery`` gives; a cluster and its rows are parts of it.
"""

from __future__ import annotations

from typing import Any

from oodprompt.reports.style import count, number

NEAREST = 3  # clusters shown as candidates when nothing survives


def survivors(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The clusters that pass every filter, by falling gap G."""
    return [cluster for cluster in content["clusters"] if cluster["survives"]]


def dropped(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The clusters that some filter drops, by falling gap G."""
    return [cluster for cluster in content["clusters"] if not cluster["survives"]]


def row_of_class(cluster: dict[str, Any], name: str) -> dict[str, Any]:
    """What the cluster does to one class: accuracy and number of its images with the cluster and without."""
    return next(row for row in cluster["classes"] if row["class"] == name)


def largest_gaps(cluster: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """The ``most`` classes whose gaps are largest in size, by falling gap."""
    rows = sorted(cluster["classes"], key=lambda row: -abs(row["gap"]))[:most]
    return sorted(rows, key=lambda row: -row["gap"])


def verdict(content: dict[str, Any]) -> str:
    """The outcome in one to two sentences."""
    surviving, clusters = survivors(content), content["clusters"]
    if not clusters:
        return "No cluster was found."
    if not surviving:
        return (
            f"None of the {count(len(clusters), 'cluster')} survives the filters. That is a normal outcome: no "
            "group of regions passes every test of a shortcut that the model has learned."
        )
    verb = "survives" if len(surviving) == 1 else "survive"
    text = f"{len(surviving)} of {count(len(clusters), 'cluster')} {verb} the filters."
    if surviving[0]["helps"] is not None:
        text += f" The strongest is tied to “{surviving[0]['helps']}”."
    return text


def how_it_was_made(content: dict[str, Any]) -> list[tuple[str, str]]:
    """The facts that the caller gave, and those of the clustering, as (name, value)."""
    clustering = content["clustering"]
    return [(str(key), str(value)) for key, value in content["facts"].items()] + [
        ("images, regions", f"{content['num_images']:,}, {content['num_regions']:,}"),
        ("clusters (K)", str(clustering["k"])),
        ("mean silhouette", number(clustering["silhouette"])),
        ("sum of distances to the medoids", number(clustering["objective"])),
    ]
