"""The tables of docs/audit.md: which rank the planted attribute has among the proposals, and how many are strong.

    python scripts/maintain/audit_tables.py --out output/audit_tables --digits FOLDER_OF_MNIST

Every setting is audited with zero-shot CLIP, the embedded ``tiny``. A proposal is the planted attribute where the presence
of its word in the training images has a correlation of 0.9 or more, either way, with the attribute labels, which the audit
does not see. The threshold of a strong suspect was chosen on render seeds 101 to 105 and on digits of seed 7.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oodprompt.auditing.run import zero_shot_config
from oodprompt.engine.trainer import PromptTrainer, build_trainer
from oodprompt.files import write_atomically
from oodprompt.reports.style import markdown_table
from oodprompt.shortcuts.finding import find_proposals
from oodprompt.shortcuts.keywords import keywords
from oodprompt.shortcuts.vocabulary import read_vocabulary
from oodprompt.studies.digits import KINDS, build_setting
from oodprompt.studies.evaluation import setting_of, teach_backbone

STRENGTHS = (0.5, 0.8, 0.95, 0.99)
# classes and scenes: those of the data set's defaults, and others
PAIRS = (
    (("circle", "diamond"), ("water", "land")),
    (("square", "star"), ("snow", "forest")),
    (("heart", "cross"), ("sand", "night")),
    (("triangle", "ring"), ("sky", "brick")),
    (("arrow", "crescent"), ("forest", "sand")),
    (("circle", "square"), ("land", "snow")),
    (("circle", "diamond", "star"), ("water", "land", "snow")),
    (("heart", "cross", "square", "ring"), ("night", "sand", "forest", "water")),
)
Row = dict[str, Any]


def measured(trainer: PromptTrainer) -> Row:
    """Rank of the planted attribute, by its association and by Bias-to-Text's score; and how many proposals are strong.

    Bias-to-Text ranks the words for each class, here by zero-shot CLIP's errors on the training images. The best rank that
    a word of the planted attribute has in any class counts.
    """
    dataset, encoder = trainer.dataset, trainer.encoder
    features, images = encoder.frozen_features_of("train"), dataset.train_x
    found = find_proposals(
        trainer.clip, dataset.classnames, dataset.template, features, images.label, read_vocabulary(), 30, False
    )
    right = trainer.objective.predict(encoder.align({"image_features": features})).argmax(dim=1).cpu().numpy()
    of_errors = keywords(found.words, features, images.label, right == images.label, dataset.num_classes, most=1000)
    values = np.unique(images.attribute)
    rank = planted = by_errors = None
    for place, proposal in enumerate(found.proposals, 1):
        present = found.present(proposal, features)[1]
        agreement = max(abs(np.corrcoef(present, images.attribute == value)[0, 1]) for value in values)
        if agreement >= 0.9:
            rank, planted = place, proposal
            words = {found.word(a) for a in (proposal.best, *proposal.same, *proposal.opposite)}
            places = [i for row in of_errors for i, k in enumerate(row, 1) if k.word in words]
            by_errors = min(places, default=None)
            break
    first = found.proposals[0]
    return {
        "rank": rank,
        "rank_by_errors": by_errors,
        "proposals": len(found.proposals),
        "strong": len(found.strong),
        "strong_words": [found.word(proposal.best) for proposal in found.strong],
        "first": found.word(first.best),
        "v": first.best.v,
        "low": first.best.low,
        "names": list((planted or first).names),
        "strong_planted": bool(planted and planted.strong),
    }


def shapes(
    out: Path, seeds: Sequence[int], pairs: Sequence[tuple[Sequence[str], Sequence[str]]], train: int = 2000
) -> Iterator[Row]:
    """A row for each strength, pair and render seed of ShapesOnScenes."""
    for classes, scenes in pairs:
        for strength in STRENGTHS:
            share = strength if len(scenes) == 2 or strength > 0.5 else 1 / len(scenes)
            for seed in seeds:
                keys = {"DATASET.NAME": "ShapesOnScenes", "DATASET.ROOT": str(out / "data"), "VERBOSE": False}
                keys |= {"DATASET.SHAPES.CORRELATION": share, "DATASET.SHAPES.RENDER_SEED": seed}
                keys |= {"DATASET.SHAPES.CLASSES": tuple(classes), "DATASET.SHAPES.SCENES": tuple(scenes)}
                keys["DATASET.SHAPES.NUM_TRAIN"] = train
                keys |= {"DATASET.SHAPES.NUM_VAL": 16, "DATASET.SHAPES.NUM_TEST": 16, "DATALOADER.NUM_WORKERS": 0}
                trainer = build_trainer(zero_shot_config(keys, "tiny", (None, None), out / "run"))
                name = f"{', '.join(classes)} on {', '.join(scenes)}"
                yield {"setting": name, "strength": share, "seed": seed} | measured(trainer)


def digits(out: Path, root: Path, seed: int, strengths: Sequence[float]) -> Iterator[Row]:
    """A row for each digit that the red rectangle goes with, by Cramer's V."""
    backbone = teach_backbone("tiny", "mnist", out / "tiny-mnist.pt")
    for strength in strengths:
        for target in KINDS["mnist"].classes:
            folder = build_setting("mnist", root, out / "settings", target, strength, n_train=2000, seed=seed)
            keys = {"DATASET.NAME": "CSV", "DATASET.ROOT": str(folder), "DATASET.CSV.OUTSIDE": True, "VERBOSE": False}
            keys |= {"DATASET.CSV.CLASSNAMES": tuple(setting_of(folder)["classes"]), "DATALOADER.NUM_WORKERS": 0}
            keys |= {"DATASET.TEMPLATE": "a photo of the number {}", "MODEL.BACKBONE.PATH": str(backbone)}
            trainer = build_trainer(zero_shot_config(keys, "tiny", (None, None), out / "run"))
            yield {"setting": target, "strength": strength, "seed": seed} | measured(trainer)


def table(rows: Sequence[Row], by: Sequence[str]) -> str:
    """A line for each value of ``by``, over all other settings."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    lines = []
    for key, mine in groups.items():
        strong, v, low = ([row[key] for row in mine] for key in ("strong", "v", "low"))
        words = Counter(word for row in mine for word in row["strong_words"])
        lines.append(
            [
                *(f"{value:.3g}" if isinstance(value, float) else value for value in key),
                f"{sum(row['rank'] == 1 for row in mine)} of {len(mine)}",
                f"{sum(row['strong_planted'] for row in mine)} of {len(mine)}",
                f"{sum(row['rank_by_errors'] == 1 for row in mine)} of {len(mine)}",
                f"{min(strong)} to {max(strong)}",
                ", ".join(f"{word} ({times})" for word, times in words.most_common()) or "-",
                f"{min(v):.2f} to {max(v):.2f}",
                f"{min(low):.2f} to {max(low):.2f}",
                ", ".join(sorted({row["first"] for row in mine})),
                "; ".join(sorted({", ".join(row["names"]) for row in mine})),
            ]
        )
    return markdown_table(
        [
            *by,
            "planted is first",
            "planted is strong",
            "first by B2T",
            "strong proposals",
            "their words (settings)",
            "V of the first",
            "its lower limit",
            "its word",
            "names",
        ],
        lines,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/audit_tables"))
    parser.add_argument("--digits", type=Path, help="folder of MNIST's files; default: without digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="render seeds of the first pair")
    parser.add_argument("--other-seeds", type=int, nargs="+", default=[1], help="render seeds of the other pairs")
    parser.add_argument(
        "--pairs",
        type=int,
        nargs="+",
        default=range(1, len(PAIRS)),
        choices=range(1, len(PAIRS)),
        help="the other pairs",
    )
    parser.add_argument("--digits-seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=("shapes", "other_shapes", "digits"), help="default: all")
    args = parser.parse_args(argv)
    work: dict[str, tuple[Iterator[Row], list[str]]] = {
        "shapes": (shapes(args.out, args.seeds, PAIRS[:1]), ["strength"]),
        "other_shapes": (
            shapes(args.out, args.other_seeds, [PAIRS[i] for i in args.pairs], 1000),
            ["setting", "strength"],
        ),
    }
    if args.digits:
        work["digits"] = (digits(args.out, args.digits, args.digits_seed, (0.95, 0.0)), ["strength"])
    for name in args.parts or work:
        rows: list[Row] = []
        for row in work[name][0]:
            rows.append(row)
            write_atomically(args.out / f"{name}.json", json.dumps(rows, indent=1) + "\n")
        print(f"\n{name}\n{table(rows, work[name][1])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
