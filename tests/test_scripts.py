"""The shell scripts: arguments of theirs do not reach the installer, a current environment is used as it is."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def environment(venv: Path, stamp: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Source environment.sh with a stand-in for the environment's Python that tells when pip is called."""
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text('#!/bin/sh\necho "called: $*"\n')
    python.chmod(0o755)
    (venv / ".oodprompt").write_text(stamp)
    script = 'set -euo pipefail; . scripts/environment.sh; echo "PY=$PY"'
    variables = {"PATH": "/usr/bin:/bin", "OODPROMPT_VENV": str(venv), "PYTHON": sys.executable}
    command = ["bash", "-c", script, "script", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=60)


def key() -> str:
    digest = hashlib.sha256((REPOSITORY / "setup.py").read_bytes()).hexdigest()
    return f"{sys.version_info.major} {sys.version_info.minor} {digest}"


def test_current_environment_is_reused_whatever_the_arguments(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"{key()}\n{REPOSITORY}\n[test]\n", "1 2 3", "output/x")
    assert (done.returncode, done.stdout) == (0, f"PY={tmp_path}/venv/bin/python\n"), done.stderr


def test_environment_of_another_checkout_is_pointed_here(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"{key()}\n/elsewhere\n[test]\n")
    assert "--no-deps -e ." in done.stdout
    assert (tmp_path / "venv" / ".oodprompt").read_text() == f"{key()}\n{REPOSITORY}\n[test]\n"


def test_changed_requirements_are_installed(tmp_path: Path) -> None:
    done = environment(tmp_path / "venv", f"old\n{REPOSITORY}\n\n", "1 2 3")
    assert done.stdout.count("called: -m pip install") == 1 and "-e .\n" in done.stdout
