"""The table of docs/export.md: how far exported files are from their runs, and how large they are.

    python scripts/maintain/export_table.py FOLDER

trains each prompt learner for three epochs on the embedded CLIP, alone and under CoOpOOD. Each run is exported with the
backbone, without it, and as an ONNX model. A run that is in FOLDER already is not trained again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

from oodprompt import cli
from oodprompt.reports.style import markdown_table
from oodprompt.serving import export

LEARNERS = ("CoOp", "KgCoOp", "CoCoOp", "MaPLe")
KEYS = [
    *("DATASET.SHAPES.NUM_TRAIN", "80", "DATASET.SHAPES.NUM_VAL", "16", "DATASET.SHAPES.NUM_TEST", "200"),
    *("DATALOADER.TRAIN_X.BATCH_SIZE", "16", "OPTIM.MAX_EPOCH", "3"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    rows = []
    for learner in LEARNERS:
        for flags, name in ((["--trainer", learner], learner), (_over(learner), f"CoOpOOD over {learner}")):
            run = folder / name.replace(" ", "_")
            with contextlib.redirect_stdout(io.StringIO()):
                if not (run / "results.json").is_file():
                    common = ["--config-file", "trainers/CoOpOOD/tiny_shapes.yaml", "--root", str(folder / "data")]
                    cli.run([*flags, *common, "--output-dir", str(run), *KEYS])
                found = export(run, run / "model.safetensors", run / "model.onnx")
                whole = export(run, run / "whole.safetensors", with_backbone=True)
            differences = (found.file_difference, whole.file_difference, found.onnx_difference or 0.0)
            sizes = (found.size / 1e3, whole.size / 1e3, found.onnx_size / 1e3)
            rows.append((name, *(f"{d:.1e}" for d in differences), *(f"{s:,.0f} kB" for s in sizes)))
            print(*rows[-1], flush=True)
    header = (
        *("method", "difference: file", "difference: file with backbone", "difference: ONNX"),
        *("size: file", "size: file with backbone", "size: ONNX"),
    )
    print(markdown_table(header, rows))


def _over(learner: str) -> list[str]:
    return ["--trainer", "CoOpOOD", "--base", learner]


if __name__ == "__main__":
    main()
