"""The tables and the picture of the controlled evaluation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oodprompt.files import write_atomically
from oodprompt.reports.style import markdown_table, new_figure, write_figure
from oodprompt.runs.tables import spread
from oodprompt.studies.metrics import TAU_EVAL, is_valid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Key = tuple[str, float]  # target (of COCO also the feature), V


def discovery_table(valid: Sequence[Key], models: dict[Any, dict[str, Any]], seeds: Sequence[int]) -> str:
    """Precision@10 of every method over all valid settings and by strength: the mean over seeds of each setting."""
    names = list(next(iter(models.values()))["precision"])

    def of(name: str, keys: Sequence[Key]) -> list[float]:
        return [statistics.fmean(models[key, seed]["precision"][name] for seed in seeds) for key in keys]

    strong = {tau: [key for key in valid if is_valid([models[key, s]["eps"] for s in seeds], tau)] for tau in TAU_EVAL}
    header = ["discovery", *(f"tau {100 * tau:.0f} ({len(keys)})" for tau, keys in strong.items())]
    return markdown_table(header, [[n, *(spread(of(n, keys), 1, 2) for keys in strong.values())] for n in names])


def mitigation_table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Accuracies of every method, mean ± standard deviation over settings and seeds, in per cent."""
    columns = ("image_worst_group", "image_overall", "region_worst_group", "region_overall")
    header = ["mitigation", *(column.replace("_", " ") for column in columns), "gain in image worst group"]
    base = [row["image_worst_group"] for row in rows["standard"]]
    table = []
    for name, measured in rows.items():
        gains = [row["image_worst_group"] - b for row, b in zip(measured, base, strict=True)]
        table.append([name, *(spread(row[c] for row in measured) for c in columns), spread(gains)])
    return markdown_table(header, table)


def figure(rows: dict[str, list[dict[str, Any]]], labels: Sequence[str]) -> Figure:
    """Worst-group accuracy of every method in every setting and seed."""
    picture = new_figure(max(7, 2.5 + 0.45 * len(labels)), 4.6)
    axes = picture.add_subplot()
    for i, (name, measured) in enumerate(rows.items()):
        values = [100 * row["image_worst_group"] for row in measured]
        axes.plot(values, "o", color=f"C{i}", label=f"{name} (mean {statistics.fmean(values):.1f})", alpha=0.85)
    axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("image worst-group accuracy, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    picture.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return picture


def write_tables(
    out: Path,
    valid: Sequence[Key],
    folder: dict[Key, Path],
    models: dict[Any, dict[str, Any]],
    mended: dict[Any, dict[str, Any]],
    ready: Sequence[tuple[Key, int]],
    methods: Sequence[str],
    seeds: Sequence[int],
) -> None:
    """The tables of a grid, printed and written."""
    rows = {"standard": [models[one] for one in ready]}
    rows |= {name: [mended[key, seed, name] for key, seed in ready] for name in methods}
    lines = [f"{len(valid)} of {len(folder)} settings are valid (eps1, eps2 > 10 points with every seed)."]
    settings = [
        [key[0], f"{key[1]:g}", *(spread(models[key, s]["eps"][i] for s in seeds) for i in (0, 1)),
         "yes" if key in valid else "no", spread((models[key, s]["precision"]["RaVL"] for s in seeds), 1, 2),
         ", ".join(str(models[key, s]["attribute"]) for s in seeds)]
        for key in folder
    ]  # fmt: skip
    header = ["target", "V", "eps1", "eps2", "valid", "Precision@10 of RaVL", "class found to be helped"]
    parts = [*lines, markdown_table(header, settings)]
    if valid:
        parts.append(discovery_table(valid, models, seeds))
    if ready:
        parts += [f"Mitigation in {len(ready)} models, where discovery found something:", mitigation_table(rows)]
        write_figure(figure(rows, [f"{t} {v:g}, seed {s}" for (t, v), s in ready]), out / "settings.png")
    text = "\n\n".join(parts) + "\n"
    write_atomically(out / "table.md", text)
    results = {
        "models": [{"target": k[0], "v": k[1], "seed": s, "valid": k in valid, **m} for (k, s), m in models.items()],
        "mitigations": [
            {"target": k[0], "v": k[1], "seed": s, "method": name, **m} for (k, s, name), m in mended.items()
        ],
    }
    write_atomically(out / "results.json", json.dumps(results, indent=2) + "\n")
    print(f"{text}\nWrote {out / 'table.md'}, {out / 'results.json'}" + (f", {out / 'settings.png'}" if ready else ""))
