"""The file of a trained model: a ``Card`` and tensors, in the safetensors format; and the model that they make."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from yacs.config import CfgNode

from oodprompt.backbones import CLIP, CLIPShape, load_backbone
from oodprompt.backbones.state_dicts import brief
from oodprompt.backbones.tokenizer import OpenAITokenizer
from oodprompt.backbones.weights import add_tensors, digest
from oodprompt.config.keys import get_cfg_default, leaves
from oodprompt.config.registry import TRAINER_REGISTRY
from oodprompt.errors import UserError
from oodprompt.methods.contracts import PromptLearner
from oodprompt.methods.heads import Head
from oodprompt.serving.deployed import Deployed

FORMAT = 1
_ENTRY = "oodprompt"  # of the metadata of a safetensors file


@dataclass
class Card:
    """What the file says beside its tensors.

    ``backbone`` has name, path, activation, ``image_digest`` and ``text_digest`` (SHA256; "" where that tower has no part,
    or lies in the file) and, for a CLIP in OpenAI's layout, its ``shape``. ``input`` are the keys of the section INPUT.
    ``learner`` names the prompt learner whose text depends on the image and has the keys of the section TRAINER; else it
    is empty. ``made_from`` is for readers: trainer, base, data set.
    """

    classnames: list[str]
    template: str
    backbone: dict[str, Any]
    input: dict[str, Any]
    members: int = 1
    aggregate: str = "sum"
    learner: dict[str, Any] = field(default_factory=dict)
    made_from: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def text(self) -> str:
        """As JSON."""
        return json.dumps(dataclasses.asdict(self))


def is_plain(clip: CLIP) -> bool:
    """Whether ``clip`` is built from its shape alone: it is ours, with OpenAI's tokenizer."""
    return type(clip) is CLIP and type(clip.tokenizer) is OpenAITokenizer


def activation_of(clip: nn.Module) -> str:
    """The name of the activation of the transformers."""
    return "gelu" if any(isinstance(part, nn.GELU) for part in clip.modules()) else "quick_gelu"


def text_digest(clip: CLIP) -> str:
    """SHA256 over the parameters and buffers of all but the image tower."""
    sha256 = hashlib.sha256()
    add_tensors(sha256, ((name, value) for name, value in clip.state_dict().items() if not name.startswith("visual.")))
    return sha256.hexdigest()


def content(card: Card, tensors: dict[str, Tensor]) -> bytes:
    """The bytes of the file."""
    whole = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    return safetensors.torch.save(whole, {_ENTRY: card.text()})


def read(file: str | Path) -> tuple[Card, dict[str, Tensor]]:
    """Card and tensors of a file. ``UserError`` where it is no file of ``oodprompt export``, or of a later format."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"there is no file {path}; `oodprompt export --model-dir RUN --output {path}` writes one")
    try:
        with safe_open(str(path), framework="pt") as opened:
            text = (opened.metadata() or {}).get(_ENTRY, "")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()} if text else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {path}: {error}; it should be a file of `oodprompt export`") from error
    if not text:
        raise UserError(f"{path} holds no trained model: give a file that `oodprompt export` wrote")
    try:
        values = json.loads(text)
        if values.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {values.get('format')}, and this version reads {FORMAT}; update oodprompt"
            )
        return Card(**values), tensors
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: it is damaged ({brief(error)}); export the run again") from error


def build(
    card: Card,
    tensors: dict[str, Tensor],
    file: str | Path,
    backbone_path: str | Path = "",
    device: torch.device | str = "cpu",
) -> Deployed:
    """The model of a file. ``backbone_path``: the checkpoint of the backbone, if the card names another.

    ``UserError`` where the backbone is not the one that the model was trained on.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        part, rest = name.split(".", 1)
        parts.setdefault(part, {})[rest] = value
    clip = _clip_of(card, parts, file, backbone_path)
    # A learner keeps places of tokens where its CLIP is when it is built.
    learner = _learner_of(card, parts.get("learner", {}), clip.to(device), file) if card.learner else None
    prompts = parts.get("prompts", {})
    deep = [prompts[f"deep.{i}"] for i in range(len(prompts) - 1)]
    normalises = "normalize" in card.input["TRANSFORMS"] and not card.input["NO_TRANSFORM"]
    model = Deployed(
        clip,
        Head.of(parts["head"], card.members, card.aggregate),
        (prompts["first"], deep) if prompts else (),
        card.input["PIXEL_MEAN"] if normalises else (),
        card.input["PIXEL_STD"] if normalises else (),
        "instance_norm" in card.input["TRANSFORMS"] and not card.input["NO_TRANSFORM"],
        learner,
    )
    return model.to(device).eval().requires_grad_(False)


def config_of(card: Card, sections: Iterable[str] = ("INPUT",)) -> CfgNode:
    """The default config with the keys of the card, those that this version knows."""
    cfg = get_cfg_default()
    given = {"INPUT": card.input, "TRAINER": card.learner.get("keys", {})}
    for section in sections:
        _fill(cfg[section], given[section])
    return cfg


def _fill(node: CfgNode, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(node.get(key), CfgNode):
            _fill(node[key], value)
        elif key in node:
            node[key] = tuple(value) if isinstance(node[key], tuple) else value


def section(cfg: CfgNode, name: str) -> dict[str, Any]:
    """A section of the config as plain values, for a card."""
    tree: dict[str, Any] = {}
    for key, value in leaves(cfg[name]).items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = list(value) if isinstance(value, tuple) else value
    return tree


def _clip_of(card: Card, parts: dict[str, dict[str, Tensor]], file: str | Path, path: str | Path) -> CLIP:
    """The CLIP, from the file where all that is needed lies there, else loaded by its name and verified."""
    keys, tower, text = card.backbone, parts.get("tower"), parts.get("text")
    if tower is not None and keys["shape"] and (text is not None or not card.learner):
        return _from_shape(keys, tower, text)
    clip = load_backbone(keys["name"], path or keys["path"], activation=keys["setting"])
    for wanted, compute in (
        (keys["image_digest"], lambda: digest(clip.visual)),
        (keys["text_digest"], lambda: text_digest(clip)),
    ):
        if wanted and (found := compute()) != wanted:
            raise UserError(
                f"{file} was trained on another {keys['name']}: the weights here ({path or keys['path'] or keys['name']}) have the "
                f"digest {found[:12]}, not {wanted[:12]}. Give the right ones (--backbone-path), or export again --with-backbone"
            )
    if tower is not None:
        clip.visual.load_state_dict(tower)
    return clip


def _from_shape(keys: dict[str, Any], tower: dict[str, Tensor], text: dict[str, Tensor] | None) -> CLIP:
    """A CLIP whose weights lie in the file; without ``text``, its text tower has none and takes no memory."""
    shape: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in keys["shape"].items()
    }
    with torch.device("meta"):
        clip = CLIP(CLIPShape(**shape), keys["activation"])
    if text is not None:
        clip = clip.to_empty(device="cpu")
        clip.load_state_dict({**text, **{f"visual.{name}": value for name, value in tower.items()}})
    else:
        clip.visual.to_empty(device="cpu").load_state_dict(tower)
    return clip.eval().requires_grad_(False)


def _learner_of(card: Card, state: dict[str, Tensor], clip: CLIP, file: str | Path) -> PromptLearner:
    """The prompt learner whose text depends on the image."""
    name = card.learner["trainer"]
    cfg = config_of(card, ("INPUT", "TRAINER"))  # which registers the learners
    learner_class = TRAINER_REGISTRY.get(name, f"{file}").learner_class
    learner = learner_class(cfg, card.classnames, card.template, clip)
    learner.load_state_dict(state)
    return learner
