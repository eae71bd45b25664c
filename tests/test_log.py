"""Messages: bare lines on standard output, and only where they are wanted."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest

from oodprompt import cli, log
from oodprompt.log import logger, progress, show_messages
from tests.helpers.forks import Forks
from tests.helpers.runs import REPOSITORY, Arguments

# Rooms whose words are messages: a command, and who builds a model in Python, decide whether they are shown.
SILENT = ["trainers", "datasets", *(f"oodprompt/{room}" for room in ("backbones", "config", "data", "discovery"))]
SILENT += [f"oodprompt/{room}" for room in ("engine", "features", "methods", "regions")]


def test_messages_are_bare_lines_once(capsys: pytest.CaptureFixture[str]) -> None:
    show_messages()
    show_messages()
    logger.info("* accuracy: 85.3%")
    logger.warning("Note: 100% of it")
    assert capsys.readouterr().out == "* accuracy: 85.3%\nNote: 100% of it\n"


def test_a_library_shows_nothing_by_itself(tmp_path: Path, forks: Forks) -> None:
    program = tmp_path / "program.py"
    program.write_text("from oodprompt.methods.prompts import depth_within; depth_within(9, 3, 'tower')")
    done = forks.run([str(program)])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_users_own_handler_gets_messages_with_their_weight(caplog: pytest.LogCaptureFixture) -> None:
    from oodprompt.methods.prompts import depth_within

    with caplog.at_level(logging.WARNING, logger="oodprompt"):
        depth_within(9, 3, "IVLP, text tower")
    assert caplog.messages == ["IVLP, text tower: prompts in 9 blocks are asked for, this CLIP has 3"]


@pytest.mark.parametrize("room", SILENT)
def test_no_room_prints(room: str) -> None:
    def printing(path: Path) -> list[int]:
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        return [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]

    files = sorted((REPOSITORY / room).rglob("*.py"))
    assert files and {str(path): lines for path in files if (lines := printing(path))} == {}


def test_long_work_says_how_far_it_is_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    show_messages()
    with progress(4000, "Features of val images", "image", initial=1000) as bar:
        for _ in range(30):
            now[0] += 10
            bar.update(100)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10  # one in 30 s
    assert lines[0] == "Features of val images: 1,300 of 4,000 images (32%) after 0:00:30, about 0:04:30 left"
    assert list(progress.over(range(3), "x", "image", show=False)) == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_every_long_stage_says_how_far_it_is(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no time between lines, a run says a line for each: the files, features, steps, evaluation."""
    monkeypatch.setattr(log, "_EVERY", 0.0)
    command = arguments("CoOp", "out", "OPTIM.MAX_EPOCH", "1")
    assert cli.main(command) == 0
    said = (tmp_path / "out" / "log.txt").read_text()
    for stage in ("Looking for the files: ", "Features of training images", "CoOp: ", "Evaluation on test images: "):
        assert f"\n{stage}" in said
