"""The command line of ``train.py``: the ecosystem's flags, then KEY VALUE pairs."""

from __future__ import annotations

import argparse
import contextlib
import errno
import inspect
import os
import random
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from yacs.config import CfgNode

from oodprompt.config import extensions
from oodprompt.errors import UserError, nearest
from oodprompt.log import show_messages

# flag -> key
_FLAG_KEYS = {
    "root": "DATASET.ROOT",
    "output_dir": "OUTPUT_DIR",
    "resume": "RESUME",
    "seed": "SEED",
    "source_domains": "DATASET.SOURCE_DOMAINS",
    "target_domains": "DATASET.TARGET_DOMAINS",
    "transforms": "INPUT.TRANSFORMS",
    "trainer": "TRAINER.NAME",
    "base": "TRAINER.BASE",
    "backbone": "MODEL.BACKBONE.NAME",
    "head": "MODEL.HEAD.NAME",
}


class Parser(argparse.ArgumentParser):
    """Of every command of ours: its errors are one line, like all others; its description keeps its lines."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        flag = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        flags = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        raise UserError(f"{message}: {nearest(flag[1], flags)}" if flag else f"{message}; see {self.prog} --help")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="train.py",
        description="Train and evaluate prompt learners and debiasers on CLIP.",
        epilog="All keys with their defaults are in docs/config.md.",
    )
    parser.add_argument("--root", help="folder that holds the data sets (DATASET.ROOT)")
    parser.add_argument("--output-dir", help="folder of this run (OUTPUT_DIR)")
    parser.add_argument("--resume", help="folder of the run to go on with (RESUME)")
    parser.add_argument("--seed", type=int, help="seed of everything, 0 counts; negative: random (SEED)")
    parser.add_argument("--source-domains", nargs="+", metavar="NAME", help="domains to train on")
    parser.add_argument("--target-domains", nargs="+", metavar="NAME", help="domains to test on")
    parser.add_argument("--transforms", nargs="+", metavar="NAME", help="training transforms (INPUT.TRANSFORMS)")
    parser.add_argument("--config-file", help="yaml file of the method")
    parser.add_argument("--dataset-config-file", help="yaml file of the data set, merged first")
    parser.add_argument("--trainer", help="name of the trainer (TRAINER.NAME)")
    parser.add_argument("--base", help="prompt learner that a debiaser wraps (TRAINER.BASE)")
    extensions.add_flag(parser)
    parser.add_argument("--backbone", help="name of the CLIP (MODEL.BACKBONE.NAME)")
    parser.add_argument("--head", help="kept for Dassl's command lines (MODEL.HEAD.NAME)")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the model in --model-dir")
    parser.add_argument("--model-dir", default="", help="output folder of the run to evaluate")
    parser.add_argument("--load-epoch", type=int, help="epoch to evaluate; else the best model, else the last")
    parser.add_argument("--no-train", action="store_true", help="build everything and stop: a check of config and data")
    parser.add_argument("--list", action="store_true", help="print trainers, data sets and backbones")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, e.g. OPTIM.LR 0.01")
    return parser


def setup_cfg(args: argparse.Namespace) -> CfgNode:
    """The frozen config: defaults, data set's file, method's file, flags, KEY VALUE pairs, in this order."""
    from oodprompt.config.keys import check_values, get_cfg_default, merge_file, merge_opts, set_key

    extensions.add(args.imports)
    opts = list(args.opts)
    for flag in ("source_domains", "target_domains", "transforms"):
        # `--transforms a b OPTIM.LR 0.1` gives all four words to the flag; keys are those with a dot and capitals.
        words = getattr(args, flag) or []
        for i, word in enumerate(words):
            if "." in word and word.isupper():
                setattr(args, flag, words[:i])
                opts = words[i:] + opts
                break
    cfg = get_cfg_default()
    for file in (args.dataset_config_file, args.config_file):
        if file:
            merge_file(cfg, file)
    for flag, key in _FLAG_KEYS.items():
        value = getattr(args, flag)
        if value is not None:
            set_key(cfg, key, tuple(value) if isinstance(value, list) else value, f"--{flag.replace('_', '-')}")
    merge_opts(cfg, opts)
    check_values(cfg)
    if cfg.SEED < 0:
        wanted = args.seed is not None or "SEED" in opts[::2]  # a random one; else the same command again shall go on
        if wanted and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("--seed is needed with several processes, which must draw the same numbers; give 0 or more")
        drawn = random.SystemRandom().randrange(1, 2**31) if wanted else 1
        seed = _seed_of_run(cfg)
        cfg.SEED = drawn if seed is None else seed
    if not cfg.OUTPUT_DIR:
        cfg.OUTPUT_DIR = _output_dir(cfg, args)
    cfg.freeze()
    return cfg


def _seed_of_run(cfg: CfgNode) -> int | None:
    """The seed that an earlier, randomly seeded run drew in the folder that is being resumed."""
    from oodprompt.config.keys import get_cfg_default, merge_file

    file = Path(cfg.RESUME or cfg.OUTPUT_DIR or os.devnull) / "config.yaml"
    if not file.is_file():
        return None
    old = get_cfg_default()
    merge_file(old, file)
    return old.SEED


def _output_dir(cfg: CfgNode, args: argparse.Namespace) -> str:
    if cfg.RESUME:
        return cfg.RESUME
    if args.eval_only and args.model_dir:
        return str(Path(args.model_dir) / "eval")
    from oodprompt.methods.resolve import base_of

    base = base_of(cfg)
    name = cfg.TRAINER.NAME + (f"-{base}" if base != cfg.TRAINER.NAME else "")
    name = "+".join([name, *cfg.TRAINER.STACK])
    config = Path(args.config_file).stem if args.config_file else "default"
    run = Path("output") / (cfg.DATASET.NAME or "no_dataset") / name / config / f"seed{cfg.SEED}"
    return str(run / "untrained" if args.eval_only else run)


class _Tee:
    """Writes to the terminal and to the log."""

    def __init__(self, stream: IO[str], log: IO[str]) -> None:
        self.stream, self.log = stream, log

    def write(self, text: str) -> int:
        self.log.write(text)
        return self.stream.write(text)

    def flush(self) -> None:
        self.log.flush()
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


@contextlib.contextmanager
def logged(directory: str, rank: int) -> Iterator[None]:
    """Everything printed also goes to ``<directory>/log.txt`` (appended); only the first process prints at all."""
    if rank:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
        return
    path = Path(directory) / "log.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another --output-dir") from error
    with log, contextlib.redirect_stdout(_Tee(sys.stdout, log)):
        try:
            yield
        except UserError as error:
            log.write(f"error: {error}\n")
            raise
        except Exception:
            log.write(traceback.format_exc())
            raise


def print_list() -> None:
    """Registered trainers, data sets and backbones, one line each."""
    from oodprompt.backbones import BACKBONES
    from oodprompt.config.extensions import register_all
    from oodprompt.config.registry import DATASET_REGISTRY, GROUP_SOURCE_REGISTRY, TRAINER_REGISTRY

    register_all()

    def line(obj: object) -> str:
        return (inspect.getdoc(obj) or "").split("\n")[0]

    trainers = TRAINER_REGISTRY.items()
    sections = {
        "Prompt learners (--trainer, --base)": {n: line(t) for n, t in trainers if t.learner_class},
        "Debiasers (--trainer, TRAINER.STACK)": {n: line(t) for n, t in trainers if t.debiaser_class},
        "Data sets (DATASET.NAME)": {n: line(d) for n, d in DATASET_REGISTRY.items()},
        "Sources of groups (TRAINER.GROUPS)": {n: line(s) for n, s in GROUP_SOURCE_REGISTRY.items()},
        "Backbones (--backbone)": BACKBONES,
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
    cfg = setup_cfg(args)
    with logged(cfg.OUTPUT_DIR, int(os.environ.get("RANK", "0"))):
        from oodprompt.data.distributed import leave_together
        from oodprompt.engine.trainer import build_trainer

        if cfg.VERBOSE:
            print(f"** Arguments: {' '.join(argv if argv is not None else sys.argv[1:])}")
            random_seed = args.seed is not None and args.seed < 0
            again = f" (drawn at random; to go on: --output-dir {cfg.OUTPUT_DIR})" if random_seed else ""
            print(f"** Output: {cfg.OUTPUT_DIR} (all keys in config.yaml), seed {cfg.SEED}{again}")
        trainer = build_trainer(cfg)
        if args.eval_only:
            trainer.save_config()
            trainer.load_model(args.model_dir, epoch=args.load_epoch)
            trainer.test()
        elif args.no_train:
            from oodprompt.data.images import check_images

            data = trainer.dataset
            number = check_images(data.train_x, data.val, data.test)
            print(f"Config, weights and all {number:,} images are in order; nothing is trained (--no-train)")
        else:
            trainer.train()
        leave_together()


def exit_status(work: Callable[[], None]) -> int:
    """Do ``work``; returns 0 for success, 2 for a user's error (one line on stderr), 1 for anything else."""
    try:
        work()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on from the last finished epoch", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            return 1
        place = f" for {error.filename}" if error.filename else ""
        print(f"error: the disk is full{place}; free some space and run the same command again", file=sys.stderr)
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    # Threads that wait for work sleep instead of spinning: steps of a few milliseconds would otherwise take a hundred
    # times as long as soon as another program uses a core. Read by OpenMP when torch is first imported, below.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    return exit_status(lambda: run(argv))
