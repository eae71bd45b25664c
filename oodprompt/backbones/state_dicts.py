"""From the content of a file of weights to a state dict, and to that of a CLIP in OpenAI's layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from oodprompt.backbones.tensors import Ignored, read_file
from oodprompt.errors import UserError
from oodprompt.log import logger

# Under which names training programs keep the weights, best first.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights", "params")
_AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "ema")  # taken where a file has nothing else
_ENDS = ("visual.conv1.weight", "token_embedding.weight")  # every CLIP in OpenAI's layout has these
_WRAPPERS = r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."  # of compilation, sharding, checkpointing
# Of other libraries' models: constants, and numbers that play no part in features.
_NO_WEIGHT = r"(^|\.)(position_ids|attn_mask|num_batches_tracked|logit_bias)$"
_NO_WEIGHT += "|^(input_resolution|context_length|vocab_size)$"
_WHOLE = "is a whole model object, saved by torch.save(model); save model.state_dict() instead"


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name: TorchScript, safetensors, a state dict, or a dict with one; gzip or not.

    Nothing in the file is run. ``UserError`` where it cannot be read or holds no state dict.
    """
    try:
        content = read_file(file)
    except Exception as error:  # damaged bytes make unpicklers and unzippers raise nearly anything
        raise UserError(
            f"cannot read the checkpoint {file}: it is no checkpoint, or is damaged or incomplete ({brief(error)}); "
            "give a state dict, a .safetensors file or OpenAI's archive"
        ) from error
    weights = _weights(content, file)
    if not isinstance(weights, dict):
        kind = f"an object {weights.kind}" if isinstance(weights, Ignored) else f"a {type(weights).__name__}"
        raise UserError(f"{file} holds no state dict (a dict of tensors), but {kind}{_of_optimiser(content)}")
    wrong = [key for key, value in weights.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if wrong or not weights:
        which = f"its entry {wrong[0]!r} is none" if wrong else "it is empty"
        raise UserError(
            f"{file} holds no state dict, in which every entry is a name with a tensor: {which}{_of_optimiser(content)}"
        )
    return {
        re.sub(_WRAPPERS, "", key).removeprefix("module."): value
        for key, value in weights.items()
        if key != "n_averaged"  # how many weights torch.optim.swa_utils.AveragedModel took the mean of
    }


def _weights(content: Any, file: Path) -> Any:
    """The state dict in what a file holds, where it has one; ``UserError`` for a whole model."""
    for _ in range(3):  # {"model": {"state_dict": ...}}
        if isinstance(content, Ignored) and not content.kind.startswith(("numpy", "argparse")):
            raise UserError(f"{file} {_WHOLE} (its class is {content.kind})")
        if not isinstance(content, Mapping) or any(isinstance(value, Tensor) for value in content.values()):
            return content
        names = [name for name in (*_WEIGHTS, *_AVERAGED) if isinstance(content.get(name), (dict, Ignored))]
        if not names:
            return content
        if len(names) > 1:
            logger.info(f"Note: {file}: weights are read from {names[0]!r}, not from {', '.join(map(repr, names[1:]))}")
        content = content[names[0]]
    return content


def _of_optimiser(content: Any) -> str:
    """What to say of a file that has an optimiser's state and no weights."""
    if isinstance(content, dict) and {"state", "param_groups"} & content.keys() or _has(content, "optim"):
        return "; it has the state of an optimiser and no weights: give the file of the model"
    return ""


def _has(content: Any, word: str) -> bool:
    return isinstance(content, dict) and any(isinstance(key, str) and word in key for key in content)


def clip_state_dict(weights: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """The entries of a CLIP in OpenAI's layout, without whatever prefix the names have in ``file``.

    Entries without that prefix are counted in a line. ``UserError`` says what a file is that has no such CLIP, or two.
    """
    found = without_prefix(weights, _ENDS, file)
    if found is None:
        if what := _other_layout(list(weights)):
            raise UserError(f"{file} is no CLIP in OpenAI's layout: it is {what}")
        return weights
    return found


def without_prefix(weights: dict[str, Tensor], ends: Sequence[str], file: Path) -> dict[str, Tensor] | None:
    """The entries under the one prefix below which all names ``ends`` are, without it; None where there is no such prefix.

    Entries without that prefix are counted in a line. ``UserError`` where there are several.
    """
    starts = [{key.removesuffix(end) for key in weights if re.search(rf"(^|\.){re.escape(end)}$", key)} for end in ends]
    prefixes = sorted(set.intersection(*starts))
    if not prefixes:
        return None
    if len(prefixes) > 1:
        raise UserError(
            f"{file} holds {len(prefixes)} CLIPs, with names that begin with {', '.join(map(repr, prefixes))}; "
            "save the state dict of one of them"
        )
    prefix = prefixes[0]
    if not prefix:
        return weights
    others = [key for key in weights if not key.startswith(prefix)]
    if others:
        logger.info(
            f"Note: {file}: {len(others):,} entries whose names do not begin with {prefix!r} are not used ({others[0]}, ...)"
        )
    return {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}


def fitted(weights: dict[str, Tensor], own: Mapping[str, Tensor], file: Path, name: str) -> dict[str, Tensor]:
    """``weights`` of a file for the module of another library whose state dict is ``own``, all of the same names and shapes.

    What plays no part in features may be missing on either side, and single numbers may have another number of
    dimensions. ``UserError`` says what does not fit ``name``.
    """
    result = {key: value for key, value in weights.items() if key in own or not re.search(_NO_WEIGHT, key)}
    result |= {key: value for key, value in own.items() if key not in result and re.search(_NO_WEIGHT, key)}
    result = {
        key: value.reshape(own[key].shape) if key in own and value.numel() == own[key].numel() == 1 else value
        for key, value in result.items()
    }
    missing, unknown = (sorted(a.keys() - b.keys()) for a, b in ((own, result), (result, own)))
    shapes = [key for key in own if key in result and own[key].shape != result[key].shape]
    others = [
        f"{len(keys):,} {what} ({keys[0]}, ...)"
        for keys, what in ((missing, "are missing"), (unknown, "are unknown"))
        if keys
    ]
    if shapes:
        was, now = (tuple(of[shapes[0]].shape) for of in (result, own))
        others.append(f"{len(shapes):,} have another shape ({shapes[0]}: {was} in the file, {now} here)")
    if others:
        what = _other_layout(list(weights)) if 2 * len(missing) > len(own) else ""
        advice = f"it is {what}" if what else "is it of another architecture or image size?"
        raise UserError(f"{file} does not fit {name}: of {len(own):,} weights {', '.join(others)}; {advice}")
    return result


def _other_layout(keys: list[str]) -> str:
    """What weights with these names are, with what to do; "" where that is not known."""

    def some(pattern: str) -> bool:
        return any(re.search(pattern, key) for key in keys)

    if some(r"lora_|\.lora\.|adapter"):
        return "an adapter (LoRA) without the CLIP below it; merge it into its CLIP and save that model's state_dict()"
    if some(r"(^|\.)(vision_model|text_model)\."):
        return (
            "a model of Hugging Face's transformers, whose layers have other names; save the same weights from OpenAI's "
            "clip or from OpenCLIP"
        )
    if some(r"(^|\.)visual\.trunk\.") or some(r"(^|\.)text\.transformer\."):
        return "a model of OpenCLIP with towers of another kind; a ViT or ResNet as OpenAI's is needed"
    if some(r"(^|\.)(prompt_learner\.|ctx$|VPT|text_encoder\.|image_encoder\.)"):
        return "a trained prompt learner; give it by MODEL.INIT_WEIGHTS, or its run by --model-dir with --eval-only"
    if some(r"(^|\.)visual\.") and not some(r"token_embedding|(^|(?<!visual)\.)transformer\.resblocks"):
        return "an image tower alone; the text tower is needed too"
    if some(r"(^|\.)(fc|head|classifier)\.weight$"):
        return "an image classifier without a text tower"
    return ""


def brief(error: BaseException) -> str:
    """Kind and message of an error in one line; PyTorch's first line is often but a heading, so two are taken."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return ": ".join([type(error).__name__, " ".join(lines[:2])[:300]]) if lines else type(error).__name__
