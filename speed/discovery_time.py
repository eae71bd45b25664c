"""Times the clustering of regions: ``python speed/discovery_time.py --regions 4000 --dim 1024 --k-min 20 --k-max 49``.

One JSON line per number of regions; speed/README.md explains its columns. Regions are made from a seed: clusters
around random centres that have a direction in common. Every sweep has a process of its own, so that one's memory does not
count for another.

``--reference PYTHON`` names a Python that has scikit-learn-extra. It then runs the published procedure (K-medoids
"alternate" from k-means++ medoids for every K, scikit-learn's silhouette, and once more the best K) on the same
features, in turns with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

# What only one of the two Pythons has is imported where it is used.

SETTINGS = ("regions", "dim", "centres", "noise", "k_min", "k_max", "seed", "threads", "repeats", "load")
MEASURES = ("distances_s", "sweep_s", "total_s", "peak_mib")
COLUMNS = (
    *("implementation", *SETTINGS, *MEASURES, "k", "silhouette", "objective"),
    *(f"reference_{name}" for name in (*MEASURES, "k", "silhouette", "objective")),
    *("ratio", "ratio_with_distances", "no_worse", "worst_excess"),
)
NO_WORSE = 1e-6  # objectives nearer than this share are equal: sums in other orders differ so much


def make_regions(regions: int, dim: int, centres: int, noise: float, seed: int) -> np.ndarray:
    """L2-normalised float32 [regions, dim]: a common direction + one of ``centres`` random ones of uneven frequency +
    Gaussian noise, of lengths 1, 1 and about ``noise``.
    """
    rng = np.random.default_rng(seed)
    middle = rng.standard_normal((centres + 1, dim), dtype=np.float32)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    which = rng.choice(centres, regions, p=rng.dirichlet(np.full(centres, 5.0)))
    features = rng.standard_normal((regions, dim), dtype=np.float32)
    features *= np.float32(noise / dim**0.5)
    features += middle[which] + middle[-1]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return features


# --- one sweep, in its own process --------------------------------------------------------------------------------


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Our sweep on the features in the file ``case["features"]``."""
    from oodprompt.discovery import clustering

    features, seconds, kept = np.load(case["features"]), {}, {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            kept[name] = function(*args, **kwargs)
            seconds[f"{name}_s"] = time.perf_counter() - start
            return kept[name]

        return run

    clustering.distances = timed("distances", clustering.distances)
    clustering.sweep = timed("sweep", clustering.sweep)
    found = timed("total", clustering.cluster_regions)(features, range(case["k_min"], case["k_max"] + 1), case["seed"])
    return {
        **seconds,
        "peak_mib": peak_mib(),
        "k": len(found.medoids),
        "silhouette": found.silhouette,
        "objective": found.objective,
        "medoids": {str(one.k): one.medoids.tolist() for one in kept["sweep"]},
    }


def measure_reference(case: dict[str, Any]) -> dict[str, Any]:
    """The published procedure on the same features."""
    from sklearn.metrics import silhouette_score
    from sklearn_extra.cluster import KMedoids

    features = np.load(case["features"])
    start = time.perf_counter()
    d = 1 - features @ features.T
    np.clip(d, 0, 1, out=d)
    np.fill_diagonal(d, 0)
    between, best, medoids = time.perf_counter(), (0.0, 0), {}

    def fit(k: int) -> Any:
        return KMedoids(n_clusters=k, metric="precomputed", init="k-medoids++", random_state=0).fit(d)

    for k in range(case["k_min"], case["k_max"] + 1):
        found = fit(k)
        score = silhouette_score(d, found.labels_, metric="precomputed")
        medoids[str(k)] = found.medoid_indices_.tolist()
        if score > best[0]:
            best = (score, k)
    found = fit(best[1])
    score = silhouette_score(d, found.labels_, metric="precomputed")
    end = time.perf_counter()
    return {
        **{"distances_s": between - start, "sweep_s": end - between, "total_s": end - start, "peak_mib": peak_mib()},
        **{"k": best[1], "silhouette": float(score), "objective": float(found.inertia_), "medoids": medoids},
    }


def peak_mib() -> float:
    """Most memory of this process so far."""
    try:  # a new process inherits ru_maxrss from the one that started it, but not this
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 2**10, 1)
    except (OSError, IndexError):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


# --- cases --------------------------------------------------------------------------------------------------------


def compare(features: np.ndarray, ours: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """By K, whether our objective on the same matrix is no worse; the largest excess over the reference's."""
    from oodprompt.discovery.clustering import distances

    d = distances(features)
    excess = {}
    for k, medoids in reference["medoids"].items():
        mine, theirs = (float(d[chosen].min(axis=0).sum(dtype=np.float64)) for chosen in (ours["medoids"][k], medoids))
        excess[k] = mine / theirs - 1
    return {"no_worse": {k: e <= NO_WORSE for k, e in excess.items()}, "worst_excess": max(excess.values())}


def time_case(case: dict[str, Any], reference: str | None) -> dict[str, Any]:
    """Medians over repeats, ours and the reference in turns; ``{"error": ...}`` where a process fails."""
    from step_time import run_apart

    features = make_regions(*(case[name] for name in ("regions", "dim", "centres", "noise", "seed")))
    runs: dict[str, list[dict[str, Any]]] = {"": [], "reference_": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        np.save(path, features)
        words = json.dumps(case | {"features": str(path)})
        commands = {"": [sys.executable, __file__, "--case", words]}
        if reference:
            commands["reference_"] = [reference, __file__, "--reference-case", words]
        for _ in range(case["repeats"]):
            for who, command in commands.items():
                done = run_apart(command, case["threads"])
                if "error" in done:
                    return {"error": f"{who.rstrip('_') or 'oodprompt'}: {done['error']}"}
                runs[who].append(done)
    line = {
        who + name: round(median(run[name] for run in runs[who]), 4) if name in MEASURES else runs[who][0][name]
        for who in commands
        for name in (*MEASURES, "k", "silhouette", "objective")
    }
    if reference:
        line["ratio"] = round(line["reference_sweep_s"] / line["sweep_s"], 2)
        line["ratio_with_distances"] = round(line["reference_total_s"] / line["total_s"], 2)
        line |= compare(features, runs[""][0], runs["reference_"][0])
    return line


# --- command line -------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--regions", nargs="+", type=int, default=[4000], metavar="R", help="default: 4000")
    parser.add_argument("--dim", type=int, default=1024, metavar="D", help="of a feature (default: 1024)")
    parser.add_argument("--centres", type=int, default=40, metavar="N", help="of the regions made (default: 40)")
    parser.add_argument("--noise", type=float, default=1.0, metavar="X", help="about a centre (default: 1)")
    parser.add_argument("--k-min", type=int, default=20, metavar="K", help="default: 20")
    parser.add_argument("--k-max", type=int, default=49, metavar="K", help="the last K (default: 49)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="processes, of medians (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU (default: 1)")
    parser.add_argument("--reference", metavar="PYTHON", help="a Python with scikit-learn-extra, to compare with")
    return parser


def run(argv: Sequence[str]) -> None:
    """Time the cases; raises ``UserError`` for what the user can mend."""
    from oodprompt.errors import UserError

    args = parser().parse_args(argv)
    for name in ("dim", "centres", "repeats", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    if not 2 <= args.k_min <= args.k_max < min(args.regions):
        raise UserError(f"--k-min {args.k_min} --k-max {args.k_max}: give 2 <= k-min <= k-max < regions")
    if args.reference and not shutil.which(args.reference):
        raise UserError(f"--reference {args.reference}: there is no such program")
    for regions in args.regions:
        case = {name: getattr(args, name, None) for name in SETTINGS}
        case |= {"regions": regions, "load": round(os.getloadavg()[0], 2)}
        line = {"implementation": "oodprompt"} | case | time_case(case, args.reference)
        print(json.dumps({key: line[key] for key in (*COLUMNS, "error") if key in line}), flush=True)


if __name__ == "__main__":
    children = {"--case": measure, "--reference-case": measure_reference}
    if len(sys.argv) == 3 and sys.argv[1] in children:
        print(json.dumps(children[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        from oodprompt.terminal import exit_status

        sys.exit(exit_status(lambda: run(sys.argv[1:])))
