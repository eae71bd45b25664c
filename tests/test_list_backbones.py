"""The command ``oodprompt backbones``."""

from __future__ import annotations

import sys

import pytest

from oodprompt.list_backbones import main


def test_the_table_has_ours_and_open_clips(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["B-16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines if "B-16" in line
    }
    assert row["open_clip:ViT-B-16"] == ["fast", "224", "yes", "yes", "yes", "tokens, crops, masked, patches"]
    assert row["open_clip:ViT-B-16-SigLIP"] == ["general", "224", "yes", "yes", "yes", "tokens, crops"]
    assert not any("RN50" in line for line in lines)


def test_no_such_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["xyz"]) == 2
    assert "no name of a backbone holds 'xyz'" in capsys.readouterr().err


def test_without_open_clip(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert main([]) == 0
    out = capsys.readouterr().out
    assert "ViT-B/16" in out and "pip install 'oodprompt[open_clip]'" in out
