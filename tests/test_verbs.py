"""The command ``oodprompt``: its verbs, their help, and what the shell completes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import oodprompt
from oodprompt import __main__ as command
from tests.helpers.runs import REPOSITORY, command_line

LINES = 40  # of a screen


@pytest.mark.parametrize("verb", command.VERBS)
def test_the_help_of_a_verb_fits_a_screen(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["oodprompt", verb])
    with pytest.raises(SystemExit) as ended:
        command.main([verb, "--help"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0 and printed.startswith(f"usage: oodprompt {verb}")
    assert len(printed.splitlines()) <= LINES, printed


def test_all_verbs_are_listed_in_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 24 and all(f"  {verb} " in printed for verb in command.VERBS)
    assert max(map(len, printed.splitlines())) <= 110
    assert command.main([]) == 2 and capsys.readouterr().err == printed
    assert command.main(["--version"]) == 0 and capsys.readouterr().out == f"oodprompt {oodprompt.__version__}\n"
    assert command.main(["trian"]) == 2 and "did you mean 'train'?" in capsys.readouterr().err


def test_a_mistake_in_a_verb_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["train", "--trianer", "CoOp"], ["predict"], ["datasets", "CSVV"], ["backbones", "a", "b"]):
        assert command.main(words) == 2, words
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_data_sets_are_listed_and_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["datasets"]) == 0
    assert "ShapesOnScenes     Shapes (class) on scenes" in capsys.readouterr().out
    assert command.main(["datasets", "CSV"]) == 0
    printed = capsys.readouterr().out
    assert "ROOT/metadata.csv" in printed and "DATASET.CSV.FILE" in printed
    assert command.main(["datasets", "ShapesOnScenes"]) == 0
    assert "DATASET.SHAPES.CORRELATION" in capsys.readouterr().out


def test_discover_is_the_script(
    data_root: Path, tmp_path: Path, undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert command.main(["train", *command_line(data_root, folder, "ZeroshotCLIP")]) == 0
    assert command.main(["discover", "--model-dir", str(folder), "REGIONS.GRID", "(2, 2)"]) == 0
    assert (folder / "discovery.html").is_file() and "Wrote" in capsys.readouterr().out
    assert command.main(["discover", "--model-dir", str(tmp_path)]) == 2
    assert "give the output folder of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("oodprompt tra", {"train"}),
        ("oodprompt predict --model-d", {"--model-dir"}),
        ("oodprompt features --dtype flo", {"float32", "float16"}),
        ("oodprompt export --onn", {"--onnx"}),
    ],
)
def test_the_shell_completes_verbs_and_flags(line: str, words: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    asks = {
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
    }
    environment = {**os.environ, **asks, "PYTHONPATH": str(REPOSITORY), "_ARGCOMPLETE_IFS": "\n"}
    subprocess.run([sys.executable, "-m", "oodprompt"], env=environment, timeout=120, capture_output=True)
    assert set((tmp_path / "out").read_text().replace(" ", "").split()) == words


def test_help_waits_for_no_pytorch() -> None:
    code = "import sys, oodprompt.__main__ as m; m.main(['--help']); oodprompt.__version__; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", f"import oodprompt; {code}"], cwd=REPOSITORY, timeout=120, capture_output=True
        ).returncode
        == 0
    )
