"""docs/library.md and the notebook: what they show runs."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from oodprompt.__main__ import VERBS
from tests.helpers.runs import REPOSITORY, no_pictures

PAGE = (REPOSITORY / "docs" / "library.md").read_text(encoding="utf-8")
NOTEBOOK = REPOSITORY / "docs" / "tutorial.ipynb"


def test_the_examples_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    with no_pictures():
        exec(compile(code, "docs/library.md", "exec"), {"__name__": "examples"})
    assert "discovery.html" in capsys.readouterr().out
    assert (tmp_path / "features.npz").is_file() and (tmp_path / "output" / "run1" / "results.json").is_file()


def test_keywords_of_the_page_are_those_of_the_code() -> None:
    from oodprompt.library.keywords import SHORT

    assert dict(re.findall(r"^\| `(\w+)` \| `([A-Z_.]+)` \|$", PAGE, re.MULTILINE)) == SHORT


def test_the_page_lists_the_verbs() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (?=what|writes|list|checks|shows|finds)", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(rows))) == sorted(VERBS)


def test_the_notebook_is_small_and_was_executed() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert NOTEBOOK.stat().st_size < 2**20
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert all(cell.execution_count for cell in cells)
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2


@pytest.mark.slow  # last ran on 2026-11-27
@pytest.mark.timeout(900)
def test_the_notebook_runs_in_three_minutes(tmp_path: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, 4)
    began = time.monotonic()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert time.monotonic() - began < 180
    said = next(cell.outputs for cell in notebook.cells if "runs = {" in cell.source)
    assert "CoOpOOD, anchored" in said[-1]["data"]["text/plain"]
