"""The one door through which every CLIP comes: ``load_backbone``.

Weights in OpenAI's layout (the TorchScript archive that OpenAI publishes, a state dict in any usual form), found at a
given path, in ``~/.cache/clip``, or downloaded and checked by SHA256; and the small CLIPs that the package carries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oodprompt.backbones import hugging_face, open_clip_models
from oodprompt.backbones.model import CLIP, CLIPShape, ModifiedResNet, VisionTransformer
from oodprompt.backbones.preprocessing import Preprocessing
from oodprompt.backbones.source import load_registered
from oodprompt.backbones.state_dicts import brief, clip_state_dict, read_state_dict
from oodprompt.config.registry import BACKBONE_REGISTRY
from oodprompt.downloads import download
from oodprompt.downloads import sha256_of as _sha256
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
# The CLIPs that the package carries, trained by scripts/maintain/train_tiny_clip.py and train_tiny_photo.py.
EMBEDDED: dict[str, CLIPShape] = {
    "tiny": CLIPShape(128, 48, 4, 128, 8, 77, 49408, 128, 2, 3),
    "tiny-photo": CLIPShape(256, 64, (2, 2, 2, 1), 24, None, 77, 49408, 128, 2, 2),
}
BACKBONES: dict[str, str] = {
    "tiny": "embedded ViT of 48 pixels, trained on rendered shapes on scenes; no download",
    "tiny-photo": "embedded ResNet of 64 pixels, trained on photographs of 200 classes; no download",
    **dict.fromkeys(OPENAI_WEIGHTS, "OpenAI's CLIP, downloaded on first use"),
    "open_clip:ARCH/TAG": "any of OpenCLIP's, as open_clip:ViT-B-16/laion2b_s34b_b88k; open_clip:FOLDER, open_clip:hf-hub:REPO",
    "hf:REPOSITORY": "a model of transformers, as hf:openai/clip-vit-base-patch16; hf:FOLDER",
}


def embedded_file(name: str) -> Path:
    """The file of a CLIP that the package carries."""
    return Path(__file__).parent / f"{name}.pt.gz"


def load_backbone(name: str, path: str | Path = "", cache_dir: str | Path = "", activation: str = "auto") -> CLIP:
    """A CLIP in fp32 on the CPU, in evaluation mode, with no gradients.

    ``path`` names a checkpoint file and wins over ``name``; otherwise ``tiny`` and ``tiny-photo`` are read from the package,
    OpenAI's names from ``cache_dir`` (default ``~/.cache/clip``), where they are downloaded to when missing.
    ``activation`` of the transformers is quick_gelu, gelu, or auto: quick_gelu, which every name has, and OpenAI's files.

    Raises ``UserError`` for an unknown name, a missing or unreadable file, another layout, a wrong SHA256, and when
    the download fails; the message names the address, the file and the folder.
    """
    others = (open_clip_models.PREFIX, hugging_face.PREFIX)
    if (name.startswith(others) or name in BACKBONE_REGISTRY) and activation != "auto":
        raise UserError(f"MODEL.BACKBONE.ACTIVATION: {name} says itself which one it has; leave the key auto")
    if name in BACKBONE_REGISTRY:
        return load_registered(name, str(path))
    if name.startswith(open_clip_models.PREFIX):
        return open_clip_models.load_open_clip(name, path, cache_dir)
    if name.startswith(hugging_face.PREFIX):
        if path:
            raise UserError(
                f"MODEL.BACKBONE.PATH: {name} names its weights itself; give hf:FOLDER, or leave the key empty"
            )
        return hugging_face.load_hugging_face(name)
    if path:
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"MODEL.BACKBONE.PATH: no file at {file}; give a CLIP checkpoint, or leave the key empty")
    elif name in EMBEDDED:
        file = embedded_file(name)
    else:
        check_name(name)
        file = _fetch(name, Path(cache_dir or "~/.cache/clip").expanduser())
    if activation == "gelu" and not path:
        raise UserError(
            f"MODEL.BACKBONE.ACTIVATION: {name} has quick_gelu; the key is for a file in MODEL.BACKBONE.PATH"
        )
    state_dict = clip_state_dict(_read(file), file)
    try:
        model = CLIP.from_state_dict(state_dict, "quick_gelu" if activation == "auto" else activation)
    except (LookupError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{file} is not a CLIP state dict in OpenAI's layout ({brief(error)}); "
            "expected keys such as visual.conv1.weight, transformer.resblocks.0..., token_embedding.weight"
        ) from error
    return model.eval().requires_grad_(False)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file. Of OpenAI's own archives, known by their SHA256, also by TorchScript if need be."""
    try:
        return read_state_dict(file)
    except UserError:
        if _sha256(file) not in [sha256 for sha256, _ in OPENAI_WEIGHTS.values()]:
            raise
        return torch.jit.load(str(file), map_location="cpu").state_dict()


def check_name(name: str) -> None:
    """``UserError`` with the nearest known name when there is no backbone ``name``."""
    if not name:
        raise UserError("no backbone is named: give --backbone (tiny, ViT-B/16, ...) or a --config-file that names one")
    if name.startswith((open_clip_models.PREFIX, hugging_face.PREFIX)):
        return
    known = [*BACKBONES, *BACKBONE_REGISTRY.registered_names()]
    if name not in known:
        raise UserError(f"MODEL.BACKBONE.NAME: unknown backbone {name!r}: {nearest(name, known)}")


def preprocessing_of(name: str, path: str | Path = "") -> Preprocessing | None:
    """What the backbone was trained on, without a look at its weights; None for those whose files the user's keys fit."""
    if name in BACKBONE_REGISTRY:
        return BACKBONE_REGISTRY.get(name).preprocessing
    if name.startswith(open_clip_models.PREFIX):
        return open_clip_models.check_open_clip(name, path)
    return hugging_face.check_hugging_face(name) if name.startswith(hugging_face.PREFIX) else None


def digest(module: nn.Module) -> str:
    """SHA256 over name, shape, dtype and bytes of all parameters and buffers, and the activation unless it is QuickGELU."""
    sha256 = hashlib.sha256()
    if any(isinstance(part, nn.GELU) for part in module.modules()):
        sha256.update(b"gelu\n")
    if isinstance(module, VisionTransformer) and module.pool != "token":
        sha256.update(f"{module.pool}\n".encode())
    if not isinstance(module, VisionTransformer | ModifiedResNet):  # equal weights may be computed with otherwise
        sha256.update(f"{module}\n".encode())
    add_tensors(sha256, [*module.named_parameters(), *module.named_buffers()])
    return sha256.hexdigest()


def add_tensors(hashed: Any, named: Iterable[tuple[str, Tensor]]) -> None:
    """Add name, shape, dtype and bytes of tensors to what is ``hashed`` (of hashlib)."""
    for name, value in named:
        value = value.detach().cpu().contiguous()
        hashed.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().data)


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
    return download(address, file, sha256, f"the weights of {name}", by_hand)


def _write_stamp(file: Path, stamp: str) -> None:
    try:
        file.write_text(stamp)
    except OSError:
        pass  # a read-only cache folder costs a digest per run, no more
