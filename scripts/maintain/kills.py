"""Disturb runs and repeat them: does each end where the undisturbed run ends?

    python scripts/maintain/kills.py random --kills 50
    python scripts/maintain/kills.py writes
    sudo python scripts/maintain/kills.py full

Five methods are trained on a few images. ``random`` sends SIGKILL at random moments, up to two in a row, and then runs the
same command again. ``writes`` sends it ahead of every write of a run: each file that is opened, synchronised, renamed or
deleted in the output folder or in the cache of features. ``full`` fills the disk there instead, a tmpfs of a few MiB that
it mounts, and prints how runs end by what they were to write next. Then all files are compared with those of the undisturbed run:
tensors bit by bit, results, histories, names of files. Times do not count. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.helpers.forks import Forks  # noqa: E402
from tests.helpers.kills import METHODS, Killer, Tally  # noqa: E402


@contextlib.contextmanager
def mounted(folder: Path) -> Iterator[Path]:
    """A file system of 8 MiB at ``folder``."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("random", "writes", "full"))
    parser.add_argument("--kills", type=int, default=50, help="random: how many")
    parser.add_argument("--seed", type=int, default=1, help="random: of the moments")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--every", type=int, default=1, help="writes, full: only every so many")
    parser.add_argument("--draw", action="store_true", help="draw the pictures, which takes longer than the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        place = Path(folder)
        for name in ("streams", "data"):
            (place / name).mkdir()
        forks = Forks(place / "streams")
        killer = Killer(forks, place, place / "data", draws=args.draw)
        tallies: dict[str, Tally] = {}
        if args.how == "random":
            tallies[f"{len(args.methods)} methods"] = killer.at_random(args.methods, args.kills, args.seed)
        for method in args.methods if args.how == "writes" else []:
            tallies[method] = killer.at_writes(method, lambda number: number % args.every == 0)
            print(f"{method}: {tallies[method].kills} kills", flush=True)
        ends: dict[str, Counter[str]] = defaultdict(Counter)
        for method in args.methods if args.how == "full" else []:
            with mounted(place / "disk") as disk:
                chosen = killer.full_at_writes(method, disk, lambda number: number % args.every == 0, fills=True)
            tallies[method] = chosen[0]
            for what, counts in chosen[1].items():
                ends[what].update(counts)
            print(f"{method}: full {tallies[method].kills} times", flush=True)
        forks.close()
    for name, tally in tallies.items():
        print(f"{name}: {tally.kills} kills, {tally.runs} runs repeated, {tally.seconds:.0f} s")
    for what, counts in sorted(ends.items()):
        print(what)
        for end, times in counts.most_common():
            print(f"  {times} x {end}")
    problems = [line for tally in tallies.values() for line in tally.problems]
    print("\n".join(problems) if problems else "All ended where the undisturbed run ends.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
