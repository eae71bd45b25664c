"""Does every architecture of OpenCLIP work here? ``python scripts/maintain/architectures.py [WORD ...]``.

Each architecture is built with random weights and few layers at its real widths. Image towers are the real ones of timm,
with their depth cut. Nothing is downloaded: text towers of the hub are built from their config classes, and a tokenizer
of words stands in for each real one. Images are small (4 x 4 patches, or 128 pixels) without --real-size; what then
differs in the size of images alone is loaded, and trained once.

For each architecture it says whether it loads, on which path, and whether one training step of CoOp, of MaPLe and of
CoOpOOD with known attributes changes what is trained, and whether RaVL's discovery runs in what CoOp trained. What a
backbone takes must be what ``oodprompt backbones`` says of it. Tables are Markdown: families first, then all.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

import open_clip  # noqa: E402
import torch  # noqa: E402

import datasets  # noqa: E402, F401
import trainers  # noqa: E402, F401
from oodprompt import list_backbones  # noqa: E402
from oodprompt.backbones import CLIP  # noqa: E402
from oodprompt.backbones.open_clip_models import PREFIX, adapt, path_of  # noqa: E402
from oodprompt.config.keys import get_cfg_default, merge_file, merge_opts  # noqa: E402
from oodprompt.engine import assembly  # noqa: E402
from oodprompt.engine.trainer import PromptTrainer, build_trainer  # noqa: E402
from oodprompt.errors import UserError  # noqa: E402
from oodprompt.reports.style import markdown_table  # noqa: E402
from tests.helpers.architectures import as_trained, build_small, built_of, family, tokenizer_of  # noqa: E402

STEPS = {
    "CoOp": ["TRAINER.NAME", "CoOp"],
    "MaPLe": ["TRAINER.NAME", "MaPLe", "TRAINER.MAPLE.PROMPT_DEPTH", "2", "DATALOADER.FEATURE_CACHE", "off"],
    "CoOpOOD": ["TRAINER.NAME", "CoOpOOD", "TRAINER.COOPOOD.ANCHOR", "attributes"],
}
WORKS = (*STEPS, "discovery")
COLUMNS = ("architecture", "path", "pixels", "regions", *WORKS)
OWN = "TRAINER.COOP.N_CTX 4 REGIONS.GRID (2,2) DISCOVERY.K_RANGE (2,3)"
SMALL = (
    "DATASET.SHAPES.NUM_TRAIN 8 DATASET.SHAPES.NUM_VAL 4 DATASET.SHAPES.NUM_TEST 4 DATASET.SHAPES.CORRELATION 0.8 "
    "DATALOADER.TRAIN_X.BATCH_SIZE 8 DATALOADER.FEATURE_CACHE memory OPTIM.MAX_EPOCH 1 OPTIM.WARMUP_EPOCH -1 VERBOSE False"
)


def trainer_of(clip: CLIP, name: str, keys: Sequence[str], folder: Path) -> PromptTrainer:
    """The trainer that ``keys`` name over ``clip``, on few rendered images."""
    cfg = get_cfg_default()
    merge_file(cfg, REPOSITORY / "configs" / "trainers" / "CoOpOOD" / "tiny_shapes.yaml")
    own = clip.preprocessing
    assert own is not None, "open_clip says what an image tower was trained on"
    words = [*SMALL.split(), *OWN.split(), *keys, "DATASET.ROOT", str(folder / "data"), "OUTPUT_DIR", str(folder)]
    words += [
        "INPUT.SIZE",
        str(own.size),
        "INPUT.PIXEL_MEAN",
        str(list(own.mean)),
        "INPUT.PIXEL_STD",
        str(list(own.std)),
    ]
    merge_opts(cfg, [*words, "MODEL.BACKBONE.NAME", PREFIX + name])
    cfg.freeze()
    with mock.patch.object(assembly, "load_backbone", lambda *_, **__: clip):
        return build_trainer(cfg)


def one_step(trainer: PromptTrainer) -> None:
    """One step of training. ``AssertionError`` where it leaves the prompts as they were or touches the backbone."""
    learned = {key: value for key, value in trainer.learner.named_parameters() if value.requires_grad}
    before = {key: value.detach().clone() for key, value in learned.items()}
    trainer.before_train()
    trainer.before_epoch()
    trainer.run_epoch()
    same = [key for key, value in learned.items() if torch.equal(value, before[key])]
    assert learned and not same, f"a step left as they were: {same}"
    assert all(value.isfinite().all() for value in learned.values()), "values that are not finite"
    assert not any(value.grad is not None for value in trainer.clip.parameters()), "the backbone has gradients"


def one_discovery(trainer: PromptTrainer, folder: Path) -> None:
    """RaVL's discovery in what was trained."""
    found = trainer.discovery.discover(trainer.learner, trainer.objective.predict, "CoOp", folder, pictures=False)
    assert found.owner["val"].numel() == 16, "four regions of each of four images"


def outcome(name: str, call: Callable[[], Any]) -> str:
    """Whether it works: yes; "refused: why" where a ``UserError`` says so, "failed: why" for all else."""
    try:
        call()
    except UserError as error:
        return f"refused: {error}".replace(name, "ARCH")
    except Exception as error:  # which is what is looked for
        return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return "yes"


def examine(
    name: str, real_size: bool, folder: Path, equals: dict[str, dict[str, str]] | None = None
) -> dict[str, str]:
    """A row: what works with an architecture. ``equals`` are rows by what was built; what is in it is not trained again."""
    row = dict.fromkeys(COLUMNS, "-") | {"architecture": name}
    made: dict[str, CLIP] = {}

    def load() -> None:
        module = build_small(name, real_size=real_size)
        row["path"], row["pixels"] = path_of(module), str(as_trained(module).size[0])
        clip = adapt(module, tokenizer_of(name, module), as_trained(module), PREFIX + name)
        takes = ["no", "yes"][clip.takes_deep_text_prompts], ["no", "yes"][clip.takes_visual_prompts]
        found = (row["path"], *takes, ", ".join(clip.region_ways))
        said = next(listed for listed in list_backbones.rows(name) if listed[0] == PREFIX + name)
        assert found == (said[1], *said[4:]), f"oodprompt backbones says {said[1:]}, it has {found}"
        row["regions"], made["clip"] = found[-1], clip

    loaded = outcome(name, load)
    if loaded != "yes":
        return row | {"path": loaded}
    equals, key = {} if equals is None else equals, f"{built_of(name, real_size)} {row}".replace(name, "")
    if key in equals:
        return row | {kind: equals[key][kind] for kind in WORKS}
    equals[key] = row
    trained: dict[str, PromptTrainer] = {}

    def train(kind: str) -> None:
        trained[kind] = trainer_of(made["clip"], name, STEPS[kind], folder / kind)
        one_step(trained[kind])

    for kind in STEPS:
        row[kind] = outcome(name, lambda kind=kind: train(kind))
    if row["CoOp"] == "yes":
        row["discovery"] = outcome(name, lambda: one_discovery(trained["CoOp"], folder))
    return row


def table(rows: Sequence[dict[str, str]]) -> str:
    """A table of families, where equal rows are one; how many say what; and a table of all."""
    notes: dict[str, int] = {}

    def brief(cell: str) -> str:
        if not cell.startswith(("refused", "failed")):
            return cell
        return f"{cell.split(':')[0]} [{notes.setdefault(cell, len(notes) + 1)}]"

    families: Counter[tuple[str, ...]] = Counter()
    for row in rows:
        families[(family(row["architecture"]), *(brief(row[column]) for column in ("path", "regions", *WORKS)))] += 1
    cells = [(kind, str(count), *rest) for (kind, *rest), count in sorted(families.items())]
    lines = [markdown_table(("towers", "architectures", "path", "regions", *WORKS), cells)]
    lines += ["", *(f"[{number}] {reason}" for reason, number in notes.items()), ""]
    for column in ("path", *WORKS):
        counts = Counter(row[column].split(":")[0] for row in rows)
        lines.append(f"{column}: " + ", ".join(f"{count} {what}" for what, count in counts.most_common()))
    lines += ["", markdown_table(COLUMNS, [[brief(row[column]) for column in COLUMNS] for row in rows])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only architectures whose name holds one of them")
    parser.add_argument("--real-size", action="store_true", help="images of the real size; takes far longer")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    names = [n for n in open_clip.list_models() if not args.words or any(word in n for word in args.words)]
    rows, equals = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(names, 1):
            began = time.time()
            with tempfile.TemporaryDirectory(dir=folder) as own:
                rows.append(examine(name, args.real_size, Path(own), equals))
            cells = ", ".join(f"{kind} {rows[-1][kind].split(':')[0]}" for kind in WORKS)
            print(
                f"{i}/{len(names)} {name}: {rows[-1]['path']}, {cells} ({time.time() - began:.1f} s)", file=sys.stderr
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return int(any("failed" in cell for row in rows for cell in row.values()))


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(main())
