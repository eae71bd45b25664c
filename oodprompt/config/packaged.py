"""Configuration files by their names: those of the checkout, or those that an installed package brings along."""

from __future__ import annotations

from pathlib import Path

import oodprompt

_PACKAGE = Path(oodprompt.__file__).resolve().parent


def configs() -> Path:
    """The folder of our configuration files: ``configs/`` of the checkout, else of the installed package."""
    return (_PACKAGE.parent if oodprompt.IS_CHECKOUT else _PACKAGE) / "configs"


def find_config(name: str | Path) -> Path:
    """The file ``name``; where there is none, ours of this name, "trainers/CoOp/tiny_shapes.yaml", with or without configs/."""
    path = Path(name)
    if path.is_file() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    ours = configs().joinpath(*parts)
    return ours if parts and ours.is_file() else path
