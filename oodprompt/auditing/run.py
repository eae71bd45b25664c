"""``audit``: the audit of a data set, or of a trained model, from Python; and what the command shares with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from yacs.config import CfgNode

from oodprompt.auditing.looking import Options, look_for_shortcuts
from oodprompt.auditing.regions import region_suspects
from oodprompt.config import extensions
from oodprompt.config.keys import get_cfg_default, leaves, set_key
from oodprompt.data.columns import Images
from oodprompt.data.dataset import names_are_auto
from oodprompt.data.images import PixelRules, read_image
from oodprompt.engine import device
from oodprompt.engine.arguments import build_parser, setup_cfg
from oodprompt.engine.discovery import as_seen
from oodprompt.engine.trainer import PromptTrainer, build_trainer, load_run
from oodprompt.errors import UserError
from oodprompt.files import write_atomically
from oodprompt.library.data import keys_of_data, written_data
from oodprompt.library.keywords import plain
from oodprompt.library.running import settings_of
from oodprompt.library.state import Processes, call
from oodprompt.log import logger
from oodprompt.reports.audit_page import audit_page
from oodprompt.reports.pictures import Pictures
from oodprompt.reports.results import method_title
from oodprompt.reports.style import count, listing, number

if TYPE_CHECKING:
    import pandas as pd

PAGE, CONTENT, NEXT = "audit.html", "audit.json", "train.yaml"
_ZERO_SHOT = "ZeroshotCLIP"


def audit(
    data: str | Path | pd.DataFrame | Mapping[str, Any] | None = None,
    *,
    backbone: str | None = None,
    output: str | Path | None = None,
    model_dir: str | Path | None = None,
    epoch: int | None = None,
    root: str | Path | None = None,
    config_file: str | Path | None = None,
    dataset_config_file: str | Path | None = None,
    vocabulary: str | Path = "",
    sensitive: bool = False,
    split: str = "",
    regions: bool = False,
    keys: Mapping[str, Any] | None = None,
    imports: Sequence[str | Path] = (),
    verbose: bool = False,
) -> dict[str, Any]:
    """Look for shortcuts by name in a data set, or in the model in ``model_dir``; returns the content of audit.json.

    ``data`` is what ``oodprompt.train`` takes. A run in ``model_dir`` has its own data, backbone and config. ``output`` is
    the folder of audit.html, audit.json and train.yaml: by default "audit", or "audit" in the run's folder.
    ``vocabulary`` is a file of words, "captions", or "" for the built-in words. ``sensitive`` adds those that describe
    people by group. Accuracies are measured on ``split`` ("": val, else test). ``regions`` runs discovery, too. Raises
    ``UserError`` for what the caller can mend.
    """
    processes = Processes()
    with call(processes, verbose):
        extensions.add([str(name) for name in imports])
        own = {key: plain(value) for key, value in (keys or {}).items()}
        model_dir = None if model_dir is None else Path(model_dir).expanduser()
        options = Options(str(vocabulary), sensitive, split, regions)
        folder, files = folder_of(output, model_dir), (config_file, dataset_config_file)
        if model_dir is not None:
            if data is not None:
                raise UserError("audit: a run has its own data; give either model_dir= or data=")
            check_model_dir(model_dir, backbone, files)
            return audit_run(model_dir, epoch, own, root, folder, options)
        with written_data(data, folder) as written:
            given = keys_of_data(data, root) | written | own
            return audit_data(given, backbone, files, folder, options)


def folder_of(output: str | Path | None, model_dir: str | Path | None) -> Path:
    """Where an audit writes: ``output``, else "audit", which is in the folder of a run that is audited."""
    return Path(output).expanduser() if output is not None else Path(model_dir or "") / "audit"


def check_model_dir(model_dir: str | Path, backbone: str | None, files: Sequence[str | Path | None]) -> None:
    """``UserError`` where there is no folder ``model_dir``, or what a run has of its own is given beside it."""
    if backbone or any(files):
        raise UserError("--model-dir: the run has its own backbone and config; leave out --backbone and config files")
    if not Path(model_dir).is_dir():
        raise UserError(f"--model-dir: there is no folder {model_dir}; give the output folder of a run")


def audit_data(
    given: Mapping[str, Any],
    backbone: str | None,
    files: tuple[str | Path | None, str | Path | None],
    folder: Path,
    options: Options,
) -> dict[str, Any]:
    """The audit of zero-shot CLIP; ``files`` are the config files of the method and of the data set."""
    cfg = zero_shot_config(given, backbone, files, folder)
    return write_audit(build_trainer(cfg), folder, options)


def audit_run(
    directory: str | Path,
    epoch: int | None,
    keys: Mapping[str, Any],
    root: str | Path | None,
    folder: Path,
    options: Options,
) -> dict[str, Any]:
    """The audit of the model in the folder of a run."""
    words: list[Any] = [word for pair in keys.items() for word in pair]
    given = {"root": str(root) if root is not None else None, "output_dir": str(folder)}
    return write_audit(load_run(directory, epoch, words, **given), folder, options)


def zero_shot_config(
    given: Mapping[str, Any],
    backbone: str | None,
    files: tuple[str | Path | None, str | Path | None],
    folder: Path,
) -> CfgNode:
    """The config of zero-shot CLIP. Without a config file, images are prepared as for CLIP, and training is CoOp's."""
    args = build_parser().parse_args([])
    args.config_file, args.dataset_config_file = (str(file) if file else None for file in files)
    name = backbone or given.get("MODEL.BACKBONE.NAME", "")
    prepared = {} if files[0] else settings_of(name)
    args.opts = [word for pair in {**prepared, **given}.items() for word in pair]
    args.trainer, args.backbone, args.output_dir = _ZERO_SHOT, backbone, str(folder)
    return setup_cfg(args)


def write_audit(trainer: PromptTrainer, folder: Path, options: Options) -> dict[str, Any]:
    """Audit the model of ``trainer``, write audit.json, train.yaml and audit.html, and say what was found.

    They are there before regions are looked at, which takes longer, and are written again with what these show.
    """
    device.set_torch(trainer.cfg, trainer.device)
    looked = look_for_shortcuts(trainer, options)
    content, cfg = looked.content, trainer.cfg
    model = _title_of(trainer)
    content |= {
        "title": f"Audit: {cfg.DATASET.NAME} and {model}",
        "model": model,
        "facts": _facts(trainer, content),
        "has_pictures": trainer.dataset.has_pixels,
    }
    for proposal in content["proposals"]:
        proposal["command"] = next_command(trainer, folder, proposal["names"]) if proposal["names"] else None
    write_atomically(folder / NEXT, _next_config(trainer).dump())
    pictures = _pictures(looked.images, cfg) if trainer.dataset.has_pixels else None
    _write(folder, content, pictures)
    if options.regions:
        content["regions"] = region_suspects(trainer, looked, model, folder)
        seen = looked.readable.encoder.data_of(cfg.DISCOVERY.SPLIT)
        _write(folder, content, pictures, Pictures(as_seen(cfg, seen), list(seen.impaths)))
    logger.info(summary(content))
    logger.info(f"Wrote {folder / PAGE}, {folder / CONTENT}, {folder / NEXT}")
    return content


def _write(folder: Path, content: dict[str, Any], *pictures: Pictures | None) -> None:
    write_atomically(folder / CONTENT, json.dumps(content, indent=2) + "\n")
    write_atomically(folder / PAGE, audit_page(content, *pictures))


def _title_of(trainer: PromptTrainer) -> str:
    cfg = trainer.cfg
    if cfg.TRAINER.NAME == _ZERO_SHOT:
        return "zero-shot CLIP"
    return method_title({"trainer": cfg.TRAINER.NAME, "base": trainer.base_name, "stack": cfg.TRAINER.STACK})


def _facts(trainer: PromptTrainer, content: Mapping[str, Any]) -> dict[str, str]:
    cfg, words = trainer.cfg, content["vocabulary"]
    return {
        "model": _title_of(trainer),
        "checkpoint": trainer.evaluated_checkpoint or "none: nothing was trained",
        "backbone": cfg.MODEL.BACKBONE.PATH or cfg.MODEL.BACKBONE.NAME,
        "data": f"{cfg.DATASET.NAME} {cfg.DATASET.ROOT}".strip(),
        "words looked for in": f"{content['trained_on']} ({content['num_train']:,} images)",
        "accuracy measured on": f"{content['split']} ({content['num_images']:,} images)",
        "vocabulary": f"{words['source']}, {words['words']:,} words",
    }


def _next_config(trainer: PromptTrainer) -> CfgNode:
    """The config of a run on these data with this backbone, for any --trainer; without names that were proposed before."""
    cfg = get_cfg_default()
    for key, value in leaves(trainer.cfg).items():
        set_key(cfg, key, value, NEXT)
    cfg.OUTPUT_DIR = cfg.RESUME = ""
    cfg.TRAINER.NAME = cfg.TRAINER.BASE = ""
    cfg.TRAINER.STACK = cfg.TRAINER.PSEUDO_NAMES = cfg.DATASET.ATTRIBUTE_PROMPTS = ()
    if names_are_auto(cfg):
        cfg.DATASET.ATTRIBUTE_NAMES = ()
    cfg.MODEL.INIT_WEIGHTS = ""
    return cfg


def next_command(trainer: PromptTrainer, folder: Path, names: Sequence[str]) -> str:
    """What trains against the attribute ``names``, as a line for a shell. Attribute labels keep their own names."""
    words = ["oodprompt", "train", "--trainer", "CoOpOOD", "--config-file", str(folder / NEXT)]
    words += [word for name in extensions.named() for word in ("--import", name)]
    if any(parameter.requires_grad for parameter in trainer.learner.parameters()):
        words += ["--base", trainer.base_name]
    words += ["--output-dir", str(folder / "trained"), "TRAINER.COOPOOD.ANCHOR", "attributes"]
    return " ".join(map(_quoted, [*words, "TRAINER.PSEUDO_NAMES", repr(tuple(names))]))


def _quoted(word: str) -> str:
    """The word for a shell; in double quotes where it has single ones, which reads better than shlex's."""
    plain_inside = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain_inside else shlex.quote(word)


def _pictures(images: Images, cfg: CfgNode) -> Pictures:
    rules = PixelRules.of(cfg)

    def load(index: int) -> Image.Image:
        return read_image(images.impath(index), rules)

    return Pictures(load, list(images.impaths))


def summary(content: Mapping[str, Any]) -> str:
    """What was found, in a few lines."""
    strong = [p for p in content["proposals"] if p["strong"]]
    lines = [
        f"Accuracy on {content['split']}: {100 * content['accuracy']:.1f} % ({count(content['num_images'], 'image')})"
    ]
    if not strong:
        lines.append("No word is a strong suspect.")
    for proposal in content["proposals"][:5]:
        word = f"“{proposal['word']}”" + (
            f" (as {listing([w['word'] for w in proposal['same']], 4)})" if proposal["same"] else ""
        )
        kind = "Strong suspect" if proposal["strong"] else "Weaker suspect"
        lines.append(
            f"{kind}: {word} goes with {proposal['goes_with']}, V {number(proposal['v'])} "
            f"({number(proposal['low'])} to {number(proposal['high'])}); names {tuple(proposal['names']) or 'none'}"
        )
    if strong and strong[0]["command"]:
        lines.append(f"To train against the first: {strong[0]['command']}")
    return "\n".join(lines)
