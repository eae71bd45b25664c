"""``train`` and ``load``: a run from Python, with the same files and results as from the command line."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yacs.config import CfgNode

from oodprompt.config import extensions
from oodprompt.config.keys import declared_keys, get_cfg_default, merge_file
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.data.distributed import leave_together
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.settings import settings_of
from oodprompt.engine.trainer import PromptTrainer, build_trainer, load_run
from oodprompt.errors import UserError, nearest
from oodprompt.library.data import keys_of_data, name_of, written_data
from oodprompt.library.keywords import keys_of, plain, refuse_two_values
from oodprompt.library.run import Run
from oodprompt.library.state import Processes, call
from oodprompt.terminal import logged

if TYPE_CHECKING:
    import pandas as pd


def train(
    method: str,
    *,
    base: str | None = None,
    data: str | Path | pd.DataFrame | Mapping[str, Any] | None = None,
    backbone: str | None = None,
    output: str | Path | None = None,
    keys: Mapping[str, Any] | None = None,
    root: str | Path | None = None,
    config_file: str | Path | None = None,
    dataset_config_file: str | Path | None = None,
    imports: Sequence[str | Path] = (),
    verbose: bool = False,
    **settings: Any,
) -> Run:
    """Train a method, evaluate it, and write what ``train.py`` writes; returns the trained ``Run``.

    ``method`` is the registered name of a prompt learner or a debiaser, ``base`` the prompt learner under a debiaser.
    ``data`` is a folder, a csv file, a DataFrame with the csv's columns, a file of image features, a dict of arrays
    (``image_features``, ``label``, ``split``, ``class_names``, ...), or the name of a data set, which is looked for under
    ``root``. ``backbone`` names the CLIP; ``output`` is the folder of the run, where one that was broken off goes on.

    Other keywords are config keys in lower case (``anchor="attributes"``, ``attribute_names=["beach", "meadow"]``,
    ``epochs=20``, ``seed=1``); ``keys`` takes them by their full names. Without ``config_file``, the optimiser is that of
    CoOp's paper and images are prepared as for CLIP (``oodprompt.engine.settings.SETTINGS``). ``imports`` are files with
    methods of your own. ``verbose`` prints what the command line prints.

    Raises ``UserError`` for what the caller can mend.
    """
    processes = Processes()
    with call(processes, verbose):
        extensions.add([str(Path(name).expanduser()) for name in imports])
        output = None if output is None else str(Path(output).expanduser())
        args, notes = _arguments(config_file, dataset_config_file), list[str]()
        _check_method(method)
        args.trainer, args.base, args.backbone = method, base, backbone
        _check_keys(keys)
        own = dict(keys or {})
        of_data = keys_of_data(data, root)
        base_name, stack = _others(method, base, config_file, own, settings)
        name = name_of(data) or _named(own, config_file, dataset_config_file, "DATASET.NAME")
        of_words = keys_of(settings, [method, base_name, *stack], name)
        parameters = {"TRAINER.NAME": method, "TRAINER.BASE": base, "MODEL.BACKBONE.NAME": backbone} | of_data
        parameters["OUTPUT_DIR"] = output
        refuse_two_values(own, of_words, {key: value for key, value in parameters.items() if value is not None})
        given = of_data | of_words | {key: plain(value) for key, value in own.items()}
        if output is not None:
            given["OUTPUT_DIR"] = output
        prepared = {} if config_file else settings_of(backbone or given.get("MODEL.BACKBONE.NAME", ""), given)
        cfg = setup_cfg(_with(args, prepared | given), notes.append)
        keys_again = prepared | given | {"OUTPUT_DIR": cfg.OUTPUT_DIR, "SEED": cfg.SEED}
        with (
            logged(cfg.OUTPUT_DIR, int(os.environ.get("RANK", "0"))),
            written_data(data, Path(cfg.OUTPUT_DIR)) as written,
        ):
            if written:
                cfg = setup_cfg(_with(args, keys_again | written), lambda note: None)
            return Run(_trained(cfg, notes), processes, verbose)


def load(
    folder: str | Path,
    *,
    epoch: int | None = None,
    root: str | Path | None = None,
    keys: Mapping[str, Any] | None = None,
    imports: Sequence[str | Path] = (),
    verbose: bool = False,
) -> Run:
    """The trained model in the output folder of a run; its data set must be there.

    The model is that of ``epoch``, else the best, else the last. ``root`` is the folder of the data sets where it is not
    the run's; ``keys`` change other settings. Raises ``UserError`` where the folder is none of a run.
    """
    processes = Processes()
    with call(processes, verbose):
        extensions.add([str(Path(name).expanduser()) for name in imports])
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise UserError(f"load: there is no folder {folder}; give the output folder of a run")
        _check_keys(keys)
        if epoch is not None and (isinstance(epoch, bool) or not isinstance(epoch, int)):
            raise UserError(f"load: epoch= is a whole number, or None for the best model or the last, not {epoch!r}")
        own = {name: plain(value) for name, value in (keys or {}).items()}
        words: list[Any] = [word for pair in own.items() for word in pair]
        given = {"root": str(Path(root).expanduser()) if root is not None else None, "output_dir": str(folder)}
        return Run(load_run(folder, epoch, words, **given), processes, verbose)


def _trained(cfg: CfgNode, notes: Sequence[str]) -> PromptTrainer:
    for note in notes:
        print(note)
    print(f"** Output: {cfg.OUTPUT_DIR} (all keys in config.yaml), seed {cfg.SEED}")
    trainer = build_trainer(cfg)
    trainer.train()
    leave_together()
    return trainer


def _check_method(method: str) -> None:
    if not isinstance(method, str):
        raise UserError(f"train: the method is a name, as 'CoOpOOD', not a {type(method).__name__}")
    get_cfg_default()  # which registers the methods
    known = TRAINER_REGISTRY.registered_names()
    if method not in known:
        raise UserError(f"train: unknown method {method!r}: {nearest(method, known)}")


def _check_keys(own: Mapping[str, Any] | None) -> None:
    if not isinstance(own or {}, Mapping):
        raise UserError(f"keys= is a dict of config keys, as {{'OPTIM.LR': 0.01}}, not a {type(own).__name__}")
    known = declared_keys()
    for name in own or {}:
        if name not in known:
            hint = nearest(name, known).split("known:")[0].strip()
            raise UserError(f"keys=: unknown config key {name!r}: {hint or 'docs/config.md has all'}")


def _arguments(config_file: str | Path | None, dataset_config_file: str | Path | None) -> argparse.Namespace:
    args = build_parser().parse_args([])
    args.config_file = str(Path(config_file).expanduser()) if config_file else None
    args.dataset_config_file = str(Path(dataset_config_file).expanduser()) if dataset_config_file else None
    return args


def _with(args: argparse.Namespace, keys: Mapping[str, Any]) -> argparse.Namespace:
    copy = argparse.Namespace(**vars(args))
    copy.opts = [word for pair in keys.items() for word in pair]
    return copy


def _named(own: Mapping[str, Any], *rest: Any) -> Any:
    """The value of a key, the last of ``rest``, where ``own`` or the config files before it give one; else ""."""
    *files, key = rest
    cfg = get_cfg_default()
    for file in files:
        if file:
            merge_file(cfg, file)
    section, leaf = key.rsplit(".", 1)
    node = cfg
    for part in section.split("."):
        node = node[part]
    return own.get(key, node[leaf])


def _others(
    method: str, base: str | None, config_file: Any, own: Mapping[str, Any], settings: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """The names of the base and of the stacked debiasers, whose keys may be given, too."""
    trainer = TRAINER_REGISTRY.get(method)
    named = base or _named(own, config_file, "TRAINER.BASE")
    if not named and trainer.debiaser_class:
        named = trainer.debiaser_class.default_base(get_cfg_default())
    stack = settings.get("stack") or _named(own, config_file, "TRAINER.STACK")
    return named, [stack] if isinstance(stack, str) else list(stack)
