"""What libraries say while they load a model is held back, and their settings are afterwards what they were."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from transformers import CLIPModel
from transformers.utils import logging as transformers_logging

from oodprompt.backbones import load_backbone
from oodprompt.backbones.quiet import quiet
from oodprompt.errors import UserError
from tests.helpers.tiny_written import as_hugging_face, as_open_clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    as_hugging_face(folder)
    as_open_clip(folder)
    return folder


def test_models_load_in_silence(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CLIPModel.from_pretrained(folder)
    assert "Loading weights" in capfd.readouterr().err, "there is something to silence"
    load_backbone(f"hf:{folder}")
    load_backbone(f"open_clip:{folder}")
    assert capfd.readouterr() == ("", "")


def test_lines_of_libraries_are_held_back_and_ours_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler(shown)])
    names = ("transformers.modeling_utils", "timm.models", "oodprompt")
    for name in ("transformers", "timm"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with quiet("open_clip"):
        for name in (None, *names):
            logging.getLogger(name).error(f"of {name}")
    assert shown.getvalue() == "of oodprompt\n"
    logging.error("and now")
    assert shown.getvalue() == "of oodprompt\nand now\n"


def test_settings_of_libraries_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the root logger too, where a message of open_clip's would set up a handler that shows our lines again."""
    monkeypatch.setattr(logging.root, "handlers", [])
    hook, level = transformers_logging.set_tqdm_hook(None), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    load_backbone(f"hf:{folder}")
    load_backbone(f"open_clip:{folder}")
    with pytest.raises(UserError):
        load_backbone(f"hf:{folder}/missing")
    assert transformers_logging.get_verbosity() == logging.INFO and transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(level)
    assert transformers_logging.set_tqdm_hook(hook) is None
    assert not logging.root.handlers and not logging.root.filters
