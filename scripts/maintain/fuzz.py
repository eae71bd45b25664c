"""Read inputs that make no sense: only a ``UserError`` may come out: ``python scripts/maintain/fuzz.py --number 10000``.

Needs the test extras (hypothesis). Each reader gets its share of the inputs. The first input that makes another error, or
takes longer than 20 s, is made as small as possible and printed; exit status 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import fuzz  # noqa: E402


def main() -> int:
    targets = fuzz.targets()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=10_000, help="of all inputs")
    parser.add_argument("--seed", type=int, help="of the inputs; without, the same ones in every run")
    parser.add_argument("--only", nargs="+", default=list(targets), choices=list(targets), metavar="READER")
    args = parser.parse_args()
    failed, total = 0, 0
    for name in args.only:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            try:
                counts = fuzz.fuzz(targets[name], Path(folder), -(-args.number // len(args.only)), args.seed)
            except Exception:
                failed += 1
                print(f"{name}: FAILED")
                traceback.print_exc(limit=-6)
                continue
        total += sum(counts.values())
        seconds = time.monotonic() - began
        print(f"{name}: {counts['read']:,} read, {counts['refused']:,} refused, {seconds:.0f} s", flush=True)
    print(f"{total:,} inputs, {failed} readers failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
