"""``audit``: the audit of a data set, or of a trained model, from Python; and what the command shares with it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from yacs.config import CfgNode

from oodprompt.auditing.looking import Looked, Options, look_for_shortcuts
from oodprompt.auditing.regions import region_suspects
from oodprompt.config import extensions
from oodprompt.config.keys import get_cfg_default, leaves, set_key
from oodprompt.data.images import PixelRules, read_image
from oodprompt.datasets.file_lists import FilesDataset
from oodprompt.engine import device
from oodprompt.engine.arguments import build_parser, setup_cfg
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
    output: str | Path = "audit",
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

    ``data`` is what ``oodprompt.train`` takes; a run in ``model_dir`` has its own. ``output`` is the folder of audit.html,
    audit.json and train.yaml. ``vocabulary`` is a file of words, "captions", or "" for the built-in words; ``sensitive``
    adds those that describe people by group. Accuracies are measured on ``split`` ("": val, else test). ``regions`` runs
    discovery, too. Raises ``UserError`` for what the caller can mend.
    """
    processes = Processes()
    with call(processes, verbose):
        extensions.add([str(name) for name in imports])
        own = {key: plain(value) for key, value in (keys or {}).items()}
        options = Options(str(vocabulary), sensitive, split)
        if model_dir is not None:
            if data is not None or backbone is not None:
                raise UserError(
                    "audit: a run has its own data and backbone; give either model_dir= or data=, backbone="
                )
            return audit_run(model_dir, epoch, own, root, Path(output), options, regions)
        files = (config_file, dataset_config_file)
        with written_data(data, Path(output)) as written:
            given = keys_of_data(data, root) | written | own
            return audit_data(given, backbone, files, Path(output), options, regions)


def audit_data(
    given: Mapping[str, Any],
    backbone: str | None,
    files: tuple[str | Path | None, str | Path | None],
    folder: Path,
    options: Options,
    regions: bool = False,
) -> dict[str, Any]:
    """The audit of zero-shot CLIP; ``files`` are the config files of the method and of the data set."""
    cfg = zero_shot_config(given, backbone, files, folder)
    return write_audit(build_trainer(cfg), folder, options, regions)


def audit_run(
    directory: str | Path,
    epoch: int | None,
    keys: Mapping[str, Any],
    root: str | Path | None,
    folder: Path,
    options: Options,
    regions: bool = False,
) -> dict[str, Any]:
    """The audit of the model in the folder of a run."""
    words: list[Any] = [word for pair in keys.items() for word in pair]
    given = {"root": str(root) if root is not None else None, "output_dir": str(folder)}
    return write_audit(load_run(directory, epoch, words, **given), folder, options, regions)


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


def write_audit(trainer: PromptTrainer, folder: Path, options: Options, regions: bool) -> dict[str, Any]:
    """Audit the model of ``trainer``, write audit.json, train.yaml and audit.html, and say what was found."""
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
    if regions:
        content["regions"] = region_suspects(trainer, looked, model, folder)
    write_atomically(folder / NEXT, _next_config(trainer).dump())
    for place, proposal in enumerate(content["proposals"]):
        proposal["command"] = next_command(trainer, folder, proposal["names"], place == 0)
    write_atomically(folder / CONTENT, json.dumps(content, indent=2) + "\n")
    pictures = _pictures(trainer, looked) if trainer.dataset.has_pixels else None
    write_atomically(folder / PAGE, audit_page(content, pictures))
    logger.info(summary(content))
    logger.info(f"Wrote {folder / PAGE}, {folder / CONTENT}, {folder / NEXT}")
    return content


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
    """The config of a run on these data with this backbone, for any --trainer."""
    cfg = get_cfg_default()
    for key, value in leaves(trainer.cfg).items():
        set_key(cfg, key, value, NEXT)
    cfg.OUTPUT_DIR = cfg.RESUME = ""
    cfg.TRAINER.NAME = cfg.TRAINER.BASE = ""
    cfg.TRAINER.STACK = type(cfg.TRAINER.STACK)()
    cfg.MODEL.INIT_WEIGHTS = ""
    return cfg


def next_command(trainer: PromptTrainer, folder: Path, names: Sequence[str], is_first: bool) -> str:
    """What trains against the attribute ``names``, as a line for a shell.

    A data set whose files give attribute labels keeps its own names of them. ``auto`` takes the first proposal beside them.
    """
    words = ["oodprompt", "train", "--trainer", "CoOpOOD", "--config-file", str(folder / NEXT)]
    if any(parameter.requires_grad for parameter in trainer.learner.parameters()):
        words += ["--base", trainer.base_name]
    words += ["--output-dir", str(folder / "trained"), "TRAINER.COOPOOD.ANCHOR", "attributes"]
    own_names = is_first and trainer.dataset.has_attributes and isinstance(trainer.dataset, FilesDataset)
    return " ".join(map(_quoted, [*words, "DATASET.ATTRIBUTE_NAMES", "auto" if own_names else repr(tuple(names))]))


def _quoted(word: str) -> str:
    """The word for a shell; in double quotes where it has single ones, which reads better than shlex's."""
    plain_inside = "'" in word and not set(word) & set('"$`\\!')
    return f'"{word}"' if plain_inside else shlex.quote(word)


def _pictures(trainer: PromptTrainer, looked: Looked) -> Pictures:
    rules = PixelRules.of(trainer.cfg)

    def load(index: int) -> Image.Image:
        return read_image(looked.images.impath(index), rules)

    return Pictures(load, list(looked.images.impaths))


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
            f"({number(proposal['low'])} to {number(proposal['high'])}); names {tuple(proposal['names'])}"
        )
    if strong:
        lines.append(f"To train against the first: {strong[0]['command']}")
    return "\n".join(lines)
