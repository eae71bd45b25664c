"""Prove that a change of the code changes no result: golden runs before and after, compared bit for bit.

    python scripts/maintain/golden.py make /tmp/before --checkout ../before --jobs 2
    python scripts/maintain/golden.py make /tmp/after --jobs 2
    python scripts/maintain/golden.py compare /tmp/before /tmp/after

``make`` runs each golden run with the code of a checkout, in ``FOLDER/<name>``, and skips finished ones. ``compare`` prints
a table with one row per run. It exits with 1 unless all results, checkpoints, predictions and metric lines are equal.
Times, memory, the environment and the place of the folder do not count. Wording and new keys of checkpoints are notes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from golden_compare import FINISHED, compare

REPOSITORY = Path(__file__).resolve().parents[2]
LOG = "golden.log"  # in the folder of a run: what its commands print
PATIENCE = 600.0  # seconds that a command may take

# --- the runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """Commands that follow each other; ``kill_at`` names a checkpoint at which the first is killed and then repeated."""

    commands: list[list[str]]
    kill_at: str = ""
    stand_in: bool = False  # Dassl's stand-in of the checkout's tests is on the path


SMALL = "DATASET.SHAPES.NUM_TRAIN 400 DATASET.SHAPES.NUM_VAL 80 DATASET.SHAPES.NUM_TEST 120"
CROPS = ["INPUT.TRANSFORMS", "('random_resized_crop', 'random_flip', 'normalize')"]
QUICKSTART = {
    "ZeroshotCLIP": "--trainer ZeroshotCLIP",
    "CoOp": "--trainer CoOp",
    "CoOpOOD": "--trainer CoOpOOD",
    "CoOpOOD-anchored": "--trainer CoOpOOD TRAINER.COOPOOD.ANCHOR attributes",
    "DebiasedPT": "--trainer DebiasedPT",
    "CoOpOOD+DebiasedPT": "--trainer CoOpOOD --config-file configs/trainers/CoOpOOD/debiased_tiny_shapes.yaml",
}
OTHERS = {
    "RaVL": "--trainer RaVL --config-file configs/trainers/RaVL/tiny_shapes.yaml OPTIM.MAX_EPOCH 20",
    "JTT": "--trainer JTT TRAINER.JTT.FIRST_EPOCHS 10 OPTIM.MAX_EPOCH 10",
    "MaPLe": f"--trainer MaPLe {SMALL} OPTIM.MAX_EPOCH 3 TRAINER.MAPLE.PREC fp32 DATALOADER.TRAIN_X.BATCH_SIZE 32",
    "best_val": "--trainer DebiasedPT TEST.FINAL_MODEL best_val TEST.SELECTION auto TRAIN.VAL_FREQ 1 OPTIM.MAX_EPOCH 10",
    "batch_lines": "--trainer CoOpOOD --base VPT TRAIN.PRINT_FREQ 4 OPTIM.MAX_EPOCH 2 DATALOADER.TRAIN_X.BATCH_SIZE 32 "
    f"{SMALL} TRAIN.VAL_FREQ 1",
}
STACK = (
    "--trainer CoOpOOD --config-file configs/trainers/CoOpOOD/debiased_tiny_shapes.yaml OPTIM.MAX_EPOCH 8 "
    f"TRAIN.CHECKPOINT_FREQ 1 TEST.FINAL_MODEL best_val DATALOADER.TRAIN_X.BATCH_SIZE 32 {SMALL}"
)
GRID = {
    "config": "configs/trainers/CoOpOOD/tiny_shapes.yaml",
    "common": f"TRAIN.VAL_FREQ 0 OPTIM.MAX_EPOCH 10 {SMALL}",
    "settings": {"0.95": "DATASET.SHAPES.CORRELATION 0.95", "0.5": "DATASET.SHAPES.CORRELATION 0.5"},
    "methods": {"CoOp": "--trainer CoOp", "CoOpOOD": "--trainer CoOpOOD"},
}


def golden_runs(folder: Path, checkout: Path) -> dict[str, Run]:
    """All golden runs by name."""

    def train(name: str, line: str, *more: str, out: str = "", launcher: tuple[str, ...] = ()) -> list[str]:
        flags = ["--config-file", GRID["config"], "--seed", "1", "--root", str(folder / "data")]
        place = ["--output-dir", str(folder / name / out), "DATALOADER.CACHE_DIR", str(folder / "features" / name)]
        return [sys.executable, *launcher, "train.py", *flags, *place, *line.split(), *more]

    runs = {name: Run([train(name, line)]) for name, line in {**QUICKSTART, **OTHERS}.items()}
    runs["killed"] = Run([train("killed", STACK, *CROPS)], kill_at="coopood/model.pth.tar-3")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone")
    half = "--trainer CoOpOOD DATALOADER.TRAIN_X.BATCH_SIZE 64 OPTIM.MAX_EPOCH 10"
    runs["two_processes"] = Run([train("two_processes", half, launcher=torchrun)])

    trained = str(folder / "evaluated" / "trained")
    short = f"--trainer CoOpOOD OPTIM.MAX_EPOCH 3 {SMALL}"
    predict = ["scripts/predict.py", "--model-dir", trained, "--root", str(folder / "data")]
    images = folder / "evaluated" / "images"
    runs["evaluated"] = Run(
        [
            train("evaluated", short, out="trained"),
            train("evaluated", short, "--eval-only", "--model-dir", trained, out="again"),
            [sys.executable, "-c", _COPY_IMAGES, str(folder / "data"), str(images)],
            [sys.executable, *predict, "--output", str(folder / "evaluated" / "predictions.csv"), str(images)],
        ]
    )
    plugin = [str(Path(__file__).with_name("golden_plugin.py")), str(folder / "plugin"), str(folder / "data")]
    runs["plugin"] = Run([[sys.executable, *plugin]], stand_in=True)
    script = "scripts/grid.py" if (checkout / "scripts" / "grid.py").is_file() else "scripts/benchmark.py"
    place = ["--out", str(folder / "grid" / "out"), "--root", str(folder / "data")]
    yaml_file = str(folder / "grid" / "grid.yaml")
    runs["grid"] = Run([[sys.executable, script, yaml_file, *place, "--seeds", "1", "--jobs", "1"]])
    return runs


# Ten images of the small data set, of which other runs leave larger ones beside it.
_COPY_IMAGES = """
import pathlib, shutil, sys
folders = pathlib.Path(sys.argv[1]).glob("shapes_on_scenes/correlation0.95-*/images")
files = next(files for folder in folders if len(files := sorted(p for p in folder.rglob("*") if p.is_file())) == 600)
pathlib.Path(sys.argv[2]).mkdir()
for file in files[::60]:
    shutil.copy(file, pathlib.Path(sys.argv[2]) / file.name)
"""


def environment(checkout: Path, stand_in: bool) -> dict[str, str]:
    """One thread per process, the checkout's own package, no GPU."""
    paths = [str(checkout), *([str(next(checkout.glob("tests/**/stand_in")))] if stand_in else [])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def execute(name: str, run: Run, folder: Path, checkout: Path) -> str:
    """Do one golden run; returns a line that says how it went."""
    place, began = folder / name, time.time()
    if (place / FINISHED).is_file():
        return f"{name}: finished before"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if name == "grid":
        (place / "grid.yaml").write_text(json.dumps(GRID), encoding="utf-8")  # JSON is yaml
    commands = [(command, False) for command in run.commands]
    if run.kill_at:
        commands.insert(0, (run.commands[0], True))
    for command, kill in commands:
        with (place / LOG).open("ab") as log:
            process = subprocess.Popen(
                command, cwd=checkout, env=environment(checkout, run.stand_in), stdout=log, stderr=subprocess.STDOUT
            )
        done = kill_when_there(process, place / run.kill_at) if kill else process.wait(PATIENCE) == 0
        if not done:
            return f"{name}: FAILED, see {place / LOG}"
    (place / FINISHED).touch()
    return f"{name}: {time.time() - began:.0f} s"


def kill_when_there(process: subprocess.Popen[bytes], file: Path) -> bool:
    """SIGKILL as soon as ``file`` is there; False where the process ended before that."""
    until = time.time() + PATIENCE
    while process.poll() is None and time.time() < until:
        if file.is_file():
            process.kill()
            process.wait()
            return True
        time.sleep(0.005)
    return False


def make(folder: Path, checkout: Path, only: list[str], jobs: int) -> bool:
    """Do all golden runs, or those that ``only`` names; False where one failed."""
    folder, checkout = folder.resolve(), checkout.resolve()
    runs = golden_runs(folder, checkout)
    if unknown := set(only) - set(runs):
        sys.exit(f"error: --only: no golden run {sorted(unknown)[0]!r}; there are {', '.join(runs)}")
    folder.mkdir(parents=True, exist_ok=True)
    success = True
    with ThreadPoolExecutor(jobs) as pool:
        names = only or list(runs)
        for line in pool.map(lambda name: execute(name, runs[name], folder, checkout), names):
            print(line, flush=True)
            success = success and "FAILED" not in line
    return success


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="do all golden runs with the code of a checkout")
    making.add_argument("folder", type=Path)
    making.add_argument("--checkout", type=Path, default=REPOSITORY, help="whose code runs; default: this one")
    making.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs alone")
    making.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    comparing = commands.add_parser("compare", help="compare the results of two folders bit for bit")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        return 0 if make(args.folder, args.checkout, args.only, args.jobs) else 1
    return 0 if compare(args.before, args.after, list(golden_runs(args.before, REPOSITORY))) else 1


if __name__ == "__main__":
    sys.exit(main())
