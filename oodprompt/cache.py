"""``oodprompt cache``: what image features are kept on disk, and which to remove."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from oodprompt.errors import UserError
from oodprompt.terminal import Parser, exit_status

DESCRIPTION = """List the image features that runs keep on disk, or remove some. What is removed is computed anew when a run needs it.

  oodprompt cache                     list them, those used last first
  oodprompt cache prune --days 30     remove those that no run has used for 30 days, and broken-off ones
  oodprompt cache prune --gib 20      remove those used longest ago until 20 GiB are left
  oodprompt cache prune --all         remove all
"""
_GIB, _DAY = 2**30, 86_400.0


def _table(entries: Sequence, unfinished: Sequence[Path], folder: Path) -> str:
    """A line for each file: when it was used, its size, and what it holds."""
    lines = []
    for entry in entries:
        facts = entry.facts
        what = (
            f"{facts['rows']:,} of {facts['data']} {facts['split']}, {facts['backbone']} {facts['precision']}, "
            f"{facts['seconds']:,.0f} s to compute, images in {facts['folder']}"
            if {"rows", "data", "split", "backbone", "precision", "seconds", "folder"} <= set(facts)
            else "written by an older version"
        )
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(f"{used}  {_size(entry.size):>9}  {entry.path.stem[:12]}  {what}")
    if unfinished:
        lines.append(f"{len(unfinished):,} broken-off; the run that needs one goes on with it")
    total = f"{len(entries):,} files of image features, {_size(sum(entry.size for entry in entries))}, in {folder}"
    return "\n".join([*lines, total])


def _size(size: float) -> str:
    return f"{size / _GIB:.2f} GiB" if size >= 0.1 * _GIB else f"{size / 2**20:.1f} MiB"


def build_parser() -> Parser:
    parser = Parser(prog="oodprompt cache", description=DESCRIPTION)
    parser.add_argument("action", nargs="?", choices=("list", "prune"), default="list")
    parser.add_argument("--dir", default="", help="the folder; default: that of DATALOADER.CACHE_DIR")
    parser.add_argument("--days", type=float, help="prune: remove what no run has used for so many days")
    parser.add_argument("--gib", type=float, help="prune: the most that may be left, in GiB")
    parser.add_argument("--all", action="store_true", help="prune: remove everything")
    return parser


def run(argv: Sequence[str] | None = None) -> None:
    """List or prune."""
    args = build_parser().parse_args(argv)
    from oodprompt.features.store import FeatureStore, default_folder  # here: --help does not wait for them

    folder = Path(args.dir).expanduser() if args.dir else default_folder()
    if not folder.is_dir():
        if args.dir:
            raise UserError(f"--dir: there is no folder {folder}")
        print(f"no image features are kept: there is no folder {folder}")
        return
    store = FeatureStore(folder)
    if args.action == "list":
        if args.all or args.days is not None or args.gib is not None:
            raise UserError("--days, --gib and --all say what to remove: give `oodprompt cache prune`")
        print(_table(store.entries(), store.unfinished(), folder))
        return
    if not args.all and args.days is None and args.gib is None:
        raise UserError("say what to remove: --days N, --gib N or --all; `oodprompt cache` lists what there is")
    if min(args.days or 0, args.gib or 0) < 0:
        raise UserError("--days and --gib take numbers of 0 or more")
    _prune(store, args.days, args.gib, args.all)


def _prune(store, days: float | None, gib: float | None, everything: bool) -> None:
    from oodprompt.features.store import Entry

    oldest = -float("inf") if days is None else time.time() - days * _DAY
    with store.usable():
        removed = store.prune(
            lambda entry, left: everything or entry.used < oldest or (gib is not None and left > gib * _GIB)
        )
        broken = [path for path in store.unfinished() if everything or store.begun(path) < oldest]
        for path in broken:
            store.remove(path)
    left: list[Entry] = store.entries()
    print(
        f"removed {len(removed):,} files of image features ({_size(sum(entry.size for entry in removed))})"
        + (f" and {len(broken):,} broken-off ones" if broken else "")
        + f"; {len(left):,} are left ({_size(sum(entry.size for entry in left))})"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return exit_status(lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
