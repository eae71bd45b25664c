"""The one door through which every CLIP comes: ``load_backbone``.

OpenAI's checkpoints in both forms (the TorchScript archive that OpenAI publishes, a plain state dict), found at a
given path, in ``~/.cache/clip``, or downloaded and checked by SHA256; and the small ``tiny`` that the package carries.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import io
import os
import pickle
import secrets
import urllib.request
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from oodprompt.backbones.model import CLIP, CLIPShape
from oodprompt.errors import UserError, nearest

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
# Name -> (SHA256 of the file, which is also part of its address; file name). Source: openai/CLIP, clip/clip.py.
OPENAI_WEIGHTS: dict[str, tuple[str, str]] = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", "RN50.pt"),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", "RN101.pt"),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", "RN50x4.pt"),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", "RN50x16.pt"),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", "RN50x64.pt"),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
# The sizes of those CLIPs, which are otherwise read off their weights.
SHAPES: dict[str, CLIPShape] = {
    "RN50": CLIPShape(1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN101": CLIPShape(512, 224, (3, 4, 23, 3), 64, None, 77, 49408, 512, 8, 12),
    "RN50x4": CLIPShape(640, 288, (4, 6, 10, 6), 80, None, 77, 49408, 640, 10, 12),
    "RN50x16": CLIPShape(768, 384, (6, 8, 18, 8), 96, None, 77, 49408, 768, 12, 12),
    "RN50x64": CLIPShape(1024, 448, (3, 15, 36, 10), 128, None, 77, 49408, 1024, 16, 12),
    "ViT-B/32": CLIPShape(512, 224, 12, 768, 32, 77, 49408, 512, 8, 12),
    "ViT-B/16": CLIPShape(512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "ViT-L/14": CLIPShape(768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
    "ViT-L/14@336px": CLIPShape(768, 336, 24, 1024, 14, 77, 49408, 768, 12, 12),
}
TINY = Path(__file__).parent / "tiny.pt.gz"
BACKBONES: dict[str, str] = {
    "tiny": "embedded ViT of 48 pixels, trained on rendered shapes on scenes; no download",
    **dict.fromkeys(OPENAI_WEIGHTS, "OpenAI's CLIP, downloaded on first use"),
}


def load_backbone(name: str, path: str | Path = "", cache_dir: str | Path = "") -> CLIP:
    """A CLIP in fp32 on the CPU, in evaluation mode, with no gradients.

    ``path`` names a checkpoint file and wins over ``name``; otherwise ``tiny`` is read from the package and
    OpenAI's names from ``cache_dir`` (default ``~/.cache/clip``), where they are downloaded to when missing.

    Raises ``UserError`` for an unknown name, a missing or unreadable file, another layout, a wrong SHA256, and when
    the download fails; the message names the address, the file and the folder.
    """
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"MODEL.BACKBONE.PATH: no file at {file}; give a CLIP checkpoint, or leave the key empty")
    elif name == "tiny":
        file = TINY
    else:
        check_name(name)
        file = _fetch(name, Path(cache_dir or "~/.cache/clip").expanduser())
    state_dict = read_state_dict(file)
    try:
        model = CLIP.from_state_dict(state_dict)
    except (LookupError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file} is not a CLIP state dict in OpenAI's layout ({_brief(error)}); "
            "expected keys such as visual.conv1.weight, transformer.resblocks.0..., token_embedding.weight"
        ) from error
    return model.eval().requires_grad_(False)


def check_name(name: str) -> None:
    """``UserError`` with the nearest known name when there is no backbone ``name``."""
    if not name:
        raise UserError("no backbone is named: give --backbone (tiny, ViT-B/16, ...) or a --config-file that names one")
    if name not in BACKBONES:
        raise UserError(f"MODEL.BACKBONE.NAME: unknown backbone {name!r}: {nearest(name, BACKBONES)}")


def read_state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file: a TorchScript archive, a state dict, or ``{"state_dict": ...}``; gzip or not.

    Plain files are read with ``weights_only=True``; nothing in them is executed.
    """
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if _is_torchscript(content):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that TorchScript is deprecated: a user cannot change OpenAI's files
                return torch.jit.load(io.BytesIO(content), map_location="cpu").state_dict()
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"cannot read the checkpoint {file}: it is no checkpoint, is damaged, or holds more than tensors, which is "
            "not loaded because it could run code; give a state dict or OpenAI's archive"
        ) from error
    except Exception as error:  # damaged bytes make unpicklers and unzippers raise nearly anything
        raise UserError(f"cannot read the checkpoint {file}: {_brief(error)}; is the file complete?") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict):
        raise UserError(f"{file} holds no state dict (a dict of tensors), but a {type(loaded).__name__}")
    if not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()):
        raise UserError(f"{file} holds no state dict: not every entry is a name with a tensor")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def digest(module: nn.Module) -> str:
    """SHA256 over name, shape, dtype and bytes of all parameters and buffers."""
    sha256 = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        value = value.detach().cpu().contiguous()
        sha256.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        sha256.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _is_torchscript(content: bytes) -> bool:
    """A TorchScript archive is a zip with a ``constants.pkl``; ``torch.save`` writes none."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return False
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _brief(error: BaseException) -> str:
    """Kind and message of an error in one line; PyTorch's first line is often but a heading, so two are taken."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return ": ".join([type(error).__name__, " ".join(lines[:2])[:300]]) if lines else type(error).__name__


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch(name: str, folder: Path) -> Path:
    """The file of an OpenAI backbone in ``folder``; downloaded there, whole and verified, or not at all."""
    sha256, filename = OPENAI_WEIGHTS[name]
    address, file = f"{_OPENAI}/{sha256}/{filename}", folder / filename
    verified = folder / f"{filename}.verified"  # size and time of the file when its digest was last computed
    by_hand = f"download {address} elsewhere and put it at {file}, or set MODEL.BACKBONE.PATH to a checkpoint"
    if file.is_file():
        stamp = f"{sha256} {file.stat().st_size} {file.stat().st_mtime_ns}"
        if verified.is_file() and verified.read_text() == stamp:
            return file
        if _sha256(file) != sha256:
            raise UserError(f"{file} has not the SHA256 {sha256} of {name}; delete it and run again, or {by_hand}")
        _write_stamp(verified, stamp)
        return file
    temporary = folder / f".{filename}.{secrets.token_hex(4)}"
    try:
        with urllib.request.urlopen(address, timeout=30) as source:
            folder.mkdir(parents=True, exist_ok=True)
            size = source.headers.get("Content-Length") or ""
            with (
                temporary.open("xb") as target,
                tqdm(
                    total=int(size) if size.isdigit() else None, unit="B", unit_scale=True, desc=filename, disable=None
                ) as bar,
            ):
                while block := source.read(1 << 20):
                    target.write(block)
                    bar.update(len(block))
        if _sha256(temporary) != sha256:
            raise UserError(
                f"the download of {name} from {address} has not the SHA256 {sha256}; run again, or {by_hand}"
            )
        os.replace(temporary, file)
        return file
    except (OSError, http.client.HTTPException) as error:  # URLError and TimeoutError are OSErrors
        reason = getattr(error, "reason", None) or _brief(error)
        raise UserError(f"cannot get the weights of {name} ({reason}): {by_hand}") from error
    finally:
        if temporary.exists():
            temporary.unlink()


def _write_stamp(file: Path, stamp: str) -> None:
    try:
        file.write_text(stamp)
    except OSError:
        pass  # a read-only cache folder costs a digest per run, no more
