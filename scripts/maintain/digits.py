"""Digits with a red rectangle as a data set for grids: ``python scripts/maintain/digits.py --root FOLDER_OF_MNIST``.

Writes, for each target, the images, their csv file and ``<out>/<target>.yaml``, which ``--dataset-config-file`` takes. The
rectangle goes with the target class in training (Cramer's V), and with half of the images of each class in validation and
test. The embedded CLIP is taught the words of the digits; it is ``<out>/tiny-mnist.pt``. What is there is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from oodprompt.files import write_atomically
from oodprompt.studies.digits import KINDS, build_setting
from oodprompt.studies.evaluation import setting_of, teach_backbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder of MNIST's files")
    parser.add_argument("--out", type=Path, default=Path("output/digits"))
    parser.add_argument("--targets", nargs="+", choices=KINDS["mnist"].classes, default=["four", "seven"])
    parser.add_argument("--v", type=float, default=0.95, help="Cramer's V of rectangle and target in training")
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    backbone = teach_backbone("tiny", "mnist", args.out / "tiny-mnist.pt")
    for target in args.targets:
        folder = build_setting("mnist", args.root, args.out, target, args.v, 4000, 4000, 4000, seed=args.seed)
        setting = setting_of(folder)
        content = {
            "DATASET": {
                "NAME": "CSV",
                "ROOT": str(folder.absolute()),
                "CSV": {
                    "FILE": str((folder / "metadata.csv").absolute()),
                    "OUTSIDE": True,
                    "CLASSNAMES": setting["classes"],
                },
                "ATTRIBUTE_NAMES": setting["attribute_names"],
            },
            "MODEL": {"BACKBONE": {"NAME": "tiny", "PATH": str(backbone.absolute())}},
        }
        write_atomically(args.out / f"{target}.yaml", yaml.safe_dump(content, sort_keys=False))
        print(args.out / f"{target}.yaml")


if __name__ == "__main__":
    main()
