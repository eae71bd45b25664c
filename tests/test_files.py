"""Temporary files of killed processes are swept, those of living ones stay; one run at a time writes to a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from oodprompt import cli
from oodprompt.errors import UserError
from oodprompt.files import LOCK, inside, only_run_in, replacing, sweep, temporary_folder, write_atomically
from oodprompt.terminal import logged
from tests.helpers.runs import REPOSITORY

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
Start = Callable[[str], subprocess.Popen]


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest) -> Start:
    """Starts Python in a folder; it has done what it is for when it has printed a line."""

    def go(code: str) -> subprocess.Popen:
        header = "import os, sys, time\nfrom pathlib import Path\nfrom oodprompt import files\n"
        process = subprocess.Popen(
            [sys.executable, "-c", header + code],
            stdout=subprocess.PIPE,
            cwd=tmp_path,
            env=ENVIRONMENT,
        )
        request.addfinalizer(process.wait)
        request.addfinalizer(process.kill)
        assert process.stdout.readline()
        return process

    return go


def end(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


WRITING = {
    "a file": "with files.replacing(Path('a.txt')) as f: f.write(b'12345'); f.flush(); print('.', flush=True); time.sleep(99)",
    "a folder": "with files.temporary_folder(Path('.')) as f: (f / 'a').write_text('12345'); print('.', flush=True); time.sleep(99)",
}


@pytest.mark.parametrize("what", WRITING)
def test_sweeping_deletes_what_the_dead_have_left_and_not_what_the_living_write(
    what: str, start: Start, tmp_path: Path
) -> None:
    write_atomically(tmp_path / "a.txt", "old")
    process = start(WRITING[what])
    kept = {"a.txt", ".hidden.part", ".a.txt.12345678"}
    for name in kept - {"a.txt"}:
        (tmp_path / name).touch()
    assert sweep(tmp_path) == 0 and len(os.listdir(tmp_path)) == 4
    end(process)
    assert sweep(tmp_path) >= 5
    assert set(os.listdir(tmp_path)) == kept and (tmp_path / "a.txt").read_text() == "old"


def test_nothing_is_swept_where_there_are_no_locks(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(start(WRITING["a file"]))

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert sweep(tmp_path) == 0 and len(os.listdir(tmp_path)) == 1
    write_atomically(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_sweeping_follows_no_link_and_fails_nowhere(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("1")
    (tmp_path / ".a.12345678.part").symlink_to(tmp_path / "precious")
    assert sweep(tmp_path) == 0 and sweep(tmp_path / "nowhere") == 0 and sweep(tmp_path / "precious") == 0
    assert (tmp_path / "precious").read_text() == "1"


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    with temporary_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
        folder.rename(tmp_path / "new" / "whole")
    with pytest.raises(KeyboardInterrupt), temporary_folder(tmp_path / "new") as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "new") == ["whole"] and os.listdir(tmp_path / "new" / "whole") == ["a"]


def test_a_temporary_file_that_is_swept_ahead_of_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, seen = fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not seen:
            seen.extend(tmp_path.iterdir())
            seen[0].unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with replacing(tmp_path / "a") as file:
        file.write(b"1")
    assert seen and (tmp_path / "a").read_bytes() == b"1"


# --- one run at a time -----------------------------------------------------------------------------------------------

HOLDING = "with files.only_run_in(Path('out')): print('.', flush=True); time.sleep(99)"


def test_a_second_run_in_the_folder_is_refused_until_the_first_is_dead(start: Start, tmp_path: Path) -> None:
    process, out = start(HOLDING), tmp_path / "out"
    with pytest.raises(UserError, match=rf"another run \(process {process.pid} on .*\) writes to {out}: wait"):
        with only_run_in(out, patience=0.1):
            pass
    end(process)
    with only_run_in(out) as is_locked:
        assert is_locked
    assert os.listdir(out) == []


def test_a_refused_command_writes_nothing(
    start: Start, arguments: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(HOLDING)
    monkeypatch.setattr("oodprompt.files._PATIENCE", 0.1)
    with pytest.raises(UserError, match="another run"):
        cli.run(arguments("CoOp", "out", "--no-train"))
    assert os.listdir(tmp_path / "out") == [LOCK]


def test_the_worker_of_a_killed_run_holds_no_lock(start: Start, tmp_path: Path) -> None:
    fork = "if os.fork() == 0: sys.stdout.close(); time.sleep(3); os._exit(0)\n  "
    end(start(f"with files.only_run_in(Path('out')):\n  {fork}print('.', flush=True); time.sleep(99)"))
    with only_run_in(tmp_path / "out", patience=1.0):
        pass


def test_who_waits_takes_the_lock_when_the_holder_ends(start: Start, tmp_path: Path) -> None:
    start("with files.only_run_in(Path('out')): print('.', flush=True); time.sleep(0.5)")
    began = time.monotonic()
    with only_run_in(tmp_path / "out"):
        assert time.monotonic() - began > 0.2
        code = f"import time\nfrom pathlib import Path\nfrom oodprompt import files\n{HOLDING.replace('99', '0')}"
        waiting = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT)
        time.sleep(0.5)
        assert waiting.poll() is None
    assert waiting.wait(timeout=20) == 0
    assert os.listdir(tmp_path / "out") == []


def test_a_file_system_without_locks_costs_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with logged(str(tmp_path / "out"), 0):
        print("goes on")
    assert os.listdir(tmp_path / "out") == ["log.txt"]
    assert "without locks" in capsys.readouterr().out


def test_what_a_killed_run_left_in_its_folder_is_deleted_and_said(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    end(start(WRITING["a file"].replace("a.txt", "out/model/a.txt")))
    with logged(str(tmp_path / "out"), 0):
        pass
    assert os.listdir(tmp_path / "out" / "model") == []
    assert "(5 bytes)" in capsys.readouterr().out


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "expected"),
    {
        "a.jpg": True,
        "a/../b.jpg": True,
        "./a..b/c.jpg": True,
        "../data/a.jpg": True,
        "/sets/data/a.jpg": True,
        "../a.jpg": False,
        "a/../../b.jpg": False,
        "/etc/passwd": False,
        "/sets/data2/a.jpg": False,
        "/sets/data/../a.jpg": False,
    }.items(),
)
def test_paths_that_leave_the_folder_are_told(path: str, expected: bool) -> None:
    assert inside("/sets/data", path) == expected == inside("/sets/data/", path)


def test_paths_below_a_relative_folder_and_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert inside("data", str(tmp_path / "data" / "a")) and inside(".", "a/../b") and inside("/", "../etc/passwd")
    assert not inside("data", "../a") and not inside("", "../a")
