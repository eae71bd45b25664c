"""Kill runs and repeat them: does each end where the undisturbed run ends?

    python scripts/maintain/kills.py random --kills 50
    python scripts/maintain/kills.py writes

Five methods are trained on a few images. ``random`` sends SIGKILL at random moments, up to two in a row, and then runs the
same command again. ``writes`` sends it ahead of every write of a run: each file that is opened, synchronised, renamed or
deleted in the output folder or in the cache of features. Then all files are compared with those of the undisturbed run:
tensors bit by bit, results, histories, names of files. Times do not count. Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tests.helpers.forks import Forks  # noqa: E402
from tests.helpers.kills import METHODS, Killer, Tally  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", choices=("random", "writes"))
    parser.add_argument("--kills", type=int, default=50, help="random: how many")
    parser.add_argument("--seed", type=int, default=1, help="random: of the moments")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--every", type=int, default=1, help="writes: only every so many")
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
        forks.close()
    for name, tally in tallies.items():
        print(f"{name}: {tally.kills} kills, {tally.runs} runs repeated, {tally.seconds:.0f} s")
    problems = [line for tally in tallies.values() for line in tally.problems]
    print("\n".join(problems) if problems else "All ended where the undisturbed run ends.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
