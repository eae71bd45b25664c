"""The command line of ``train.py``: the ecosystem's flags, then KEY VALUE pairs."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from oodprompt.config import extensions
from oodprompt.config.registry import BACKBONE_REGISTRY, DATASET_REGISTRY, GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.errors import UserError
from oodprompt.log import show_messages
from oodprompt.terminal import exit_status, logged


def print_list() -> None:
    """Registered trainers, data sets and backbones, one line each."""
    from oodprompt.backbones import BACKBONES  # here: it takes PyTorch, for which --help does not wait

    extensions.register_all()

    def line(obj: object) -> str:
        return inspect.cleandoc(obj.__doc__ or "").split("\n")[0]  # its own, not that of a base class

    trainers = TRAINER_REGISTRY.items()
    sections = {
        "Prompt learners (--trainer, --base)": {n: line(t) for n, t in trainers if t.learner_class},
        "Debiasers (--trainer, TRAINER.STACK)": {n: line(t) for n, t in trainers if t.debiaser_class},
        "Data sets (DATASET.NAME)": {n: line(d) for n, d in DATASET_REGISTRY.items()},
        "Sources of groups (TRAINER.GROUPS)": {n: line(s) for n, s in GROUP_SOURCE_REGISTRY.items()},
        "Backbones (--backbone)": {**BACKBONES, **{n: line(b) for n, b in BACKBONE_REGISTRY.items()}},
    }
    for title, entries in sections.items():
        print(title)
        for name, text in entries.items():
            print(f"  {name:<18} {text}")


def run(argv: Sequence[str] | None = None) -> None:
    """Parse, build, train or evaluate; raises ``UserError`` for what the user can mend."""
    show_messages()
    args = build_parser().parse_intermixed_args(argv)
    if args.list:
        extensions.add(args.imports)
        print_list()
        return
    if args.model_dir and not Path(args.model_dir).is_dir():
        raise UserError(f"--model-dir: there is no folder {args.model_dir}; give the output folder of a run")
    notes: list[str] = []
    cfg = setup_cfg(args, notes.append)
    with logged(cfg.OUTPUT_DIR, int(os.environ.get("RANK", "0"))):
        from oodprompt.data.distributed import leave_together  # here: they take PyTorch, for which --help does not wait
        from oodprompt.engine.check import check_run
        from oodprompt.engine.proposed_names import names_of_model
        from oodprompt.engine.trainer import build_trainer

        for note in notes:
            print(note)
        if cfg.VERBOSE:
            print(f"** Arguments: {' '.join(argv if argv is not None else sys.argv[1:])}")
            random_seed = args.seed is not None and args.seed < 0
            again = f" (drawn at random; to go on: --output-dir {cfg.OUTPUT_DIR})" if random_seed else ""
            print(f"** Output: {cfg.OUTPUT_DIR} (all keys in config.yaml), seed {cfg.SEED}{again}")
        with names_of_model(args.model_dir if args.eval_only else None):
            trainer = build_trainer(cfg)
        if args.eval_only:
            trainer.save_config()
            trainer.load_model(args.model_dir, epoch=args.load_epoch)
            trainer.test()
        elif args.no_train:
            print(check_run(cfg, trainer.dataset, trainer.clip.tokenizer, trainer.notes))
        else:
            trainer.train()
        leave_together()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Threads that wait for work sleep instead of spinning: steps of a few milliseconds would otherwise take a hundred
    # times as long as soon as another program uses a core. Read by OpenMP when torch is first imported, below.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return exit_status(lambda: run(argv))
