"""Checkpoints in Dassl's layout: ``<dir>/<model name>/model.pth.tar-<epoch>``, ``model-best.pth.tar``, ``checkpoint``.

Dict keys are Dassl's (state_dict, epoch, optimizer, scheduler, val_result); ours adds ``oodprompt``, the engine's own
state. Only tensors and plain Python values are stored, so files load with ``weights_only=True``.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodprompt.backbones import CLIP
from oodprompt.backbones.tensors import load_tensors
from oodprompt.errors import UserError
from oodprompt.files import write_atomically

BEST = "model-best.pth.tar"


def file_of(directory: str | Path, name: str, epoch: int | str | None) -> Path:
    """The checkpoint of model ``name`` after ``epoch`` epochs, the best one for None, or the best by a criterion."""
    if isinstance(epoch, str):
        return Path(directory) / name / f"model-best-{epoch}.pth.tar"
    return Path(directory) / name / (BEST if epoch is None else f"model.pth.tar-{epoch}")


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Dassl's own files are read too, their pickled schedulers left out.

    Raises ``UserError`` for a missing or unreadable file, or one that is no checkpoint of a model.
    """
    if not path.is_file():
        found = sorted(p.name for p in path.parent.glob("model*")) if path.parent.is_dir() else []
        where = f"{path.parent} has {', '.join(found)}" if found else f"there is no checkpoint in {path.parent}"
        raise UserError(f"no model at {path}; {where}: check --model-dir and --load-epoch")
    try:
        state = load_tensors(path)
    except Exception as error:  # whatever the bytes of a foreign or damaged file make torch and pickle say
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read the checkpoint {path}: {reason}; is the file complete?") from error
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise UserError(f"{path} is no checkpoint: it has no dict 'state_dict', which Dassl's and ours have")
    return state


def load_weights(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    source: Path,
    skip: tuple[str, ...] = (),
    foreign: str = "",
) -> None:
    """Fill ``module`` from ``state_dict``; keys in ``skip`` are left as they are.

    Keys that the module has not and whose beginning matches the pattern ``foreign`` are passed over. Raises
    ``UserError`` that names keys which are missing, unknown or of another shape; then nothing is loaded.
    """
    own = {key: value for key, value in module.state_dict().items() if key not in skip}
    given = {
        key: value
        for key, value in state_dict.items()
        if key not in skip and (key in own or not foreign or not re.match(foreign, key))
    }
    problems = [f"{key} is missing" for key in own if key not in given]
    problems += [f"{key} is unknown" for key in given if key not in own]
    for key in [key for key in own if key in given]:
        shape = tuple(given[key].shape) if isinstance(given[key], Tensor) else f"of {type(given[key]).__name__}"
        if shape != tuple(own[key].shape):
            problems.append(f"{key} has shape {shape}, the model {tuple(own[key].shape)}")
    if problems:
        raise UserError(
            f"{source} does not fit the model: {'; '.join(problems[:4])}"
            + (f" and {len(problems) - 4} more" if len(problems) > 4 else "")
            + "; was it trained with another backbone, N_CTX, CSC or trainer?"
        )
    module.load_state_dict({**module.state_dict(), **given})


def check_towers(clip: CLIP, state_dict: dict[str, Tensor], source: Path) -> None:
    """``UserError`` when ``state_dict`` holds towers of another CLIP than ``clip``.

    Checkpoints of whole models (upstream's MaPLe, VPT, IVLP, PromptSRC) do, in half precision or full; prompts that
    were learned with other towers mean nothing to these.
    """
    own = clip.state_dict()
    for key, value in state_dict.items():
        name = key.replace("image_encoder.", "visual.", 1).removeprefix("text_encoder.")
        if name in own and isinstance(value, Tensor):
            expected = own[name].cpu()
            # Half precision, in PromptSRC's files after an average of as many copies as there were epochs, is within 0.4 %.
            if value.shape != expected.shape or (value.float() - expected).norm() > 0.004 * expected.norm():
                raise UserError(
                    f"{source} was trained with another CLIP: its {key} is not that of the backbone; "
                    "give the one it was trained with by --backbone or MODEL.BACKBONE.PATH"
                )


def newest_epoch(directory: str | Path, names: list[str]) -> int | None:
    """The newest epoch of which every model in ``names`` has a checkpoint under ``directory``; None if there is none."""
    epochs = []
    for name in names:
        pointer = Path(directory) / name / "checkpoint"
        if not pointer.is_file():
            return None
        target = pointer.read_bytes()[:200].decode(errors="backslashreplace").strip()
        if not re.fullmatch(r"model\.pth\.tar-[0-9]{1,9}", target):
            raise UserError(f"{pointer} names {target!r}, not a model.pth.tar-<epoch>; delete it to start anew")
        epochs.append(int(target.rsplit("-", 1)[1]))
    return min(epochs, default=None)


def write_pointer(file: Path) -> None:
    """Make ``file`` the newest checkpoint of its folder."""
    write_atomically(file.parent / "checkpoint", f"{file.name}\n")
