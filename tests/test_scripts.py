"""The shell scripts: those of trainers print command lines that train.py takes; a current environment is used as it is."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from oodprompt.engine.arguments import build_parser, setup_cfg
from tests.helpers.runs import REPOSITORY

# --- of trainers -------------------------------------------------------------------------------------------------

TRAINERS = {"coopood": "CoOpOOD", "debiasedpt": "DebiasedPT", "ravl": "RaVL"}
DEFAULT = "vit_b16_ep50_ctxv1"
PLACES = {
    "main": f"waterbirds/{{t}}/{DEFAULT}_16shots/nctx4_cscFalse_ctpend",
    "base2new_train": f"base2new/train_base/waterbirds/shots_16/{{t}}/{DEFAULT}",
    "base2new_test": f"base2new/test_new/waterbirds/shots_16/{{t}}/{DEFAULT}",
    "xd_train": f"waterbirds/{{t}}/{DEFAULT}_16shots",
    "xd_test": f"evaluation/{{t}}/{DEFAULT}_16shots/waterbirds",
    "dg": f"dg/waterbirds/{{t}}/{DEFAULT}/sketch_photo",
    "groups": f"groups/waterbirds/{{t}}/{DEFAULT}",
}


def script(name: str, *arguments: Any, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "scripts" / f"{name}.sh"), *map(str, arguments)]
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, cwd="/")


def parsed(done: subprocess.CompletedProcess[str]) -> tuple[Any, Any]:
    """The printed command, as train.py understands it: its arguments and its config."""
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == [sys.executable, "train.py"]
    args = build_parser().parse_intermixed_args(words[2:])
    for name in ("config_file", "dataset_config_file"):
        setattr(args, name, str(REPOSITORY / getattr(args, name)))
    return args, setup_cfg(args)


@pytest.mark.parametrize("folder", TRAINERS)
def test_shell_scripts_print_commands_of_train_py(folder: str) -> None:
    for kind, place in PLACES.items():
        file = REPOSITORY / "scripts" / folder / f"{kind}.sh"
        assert subprocess.run(["bash", "-n", str(file)], check=False).returncode == 0
        domains = ["sketch photo", "art cartoon"] if kind == "dg" else []
        done = script(
            f"{folder}/{kind}", "waterbirds", 3, *domains, "--dry-run", "OPTIM.LR", "0.5", DATA="/my data", OUTPUT="/o"
        )
        args, cfg = parsed(done)
        assert (TRAINERS[folder], "", 3) == (cfg.TRAINER.NAME, cfg.TRAINER.BASE, cfg.SEED)
        assert (cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.OPTIM.LR) == ("Waterbirds", "/my data", 0.5)
        assert f"/o/{place.format(t=TRAINERS[folder])}/seed3" == cfg.OUTPUT_DIR
        assert (-1 if kind in ("dg", "groups", "xd_test") else 16) == cfg.DATASET.NUM_SHOTS
        half = {"base2new_train": "base", "base2new_test": "new"}
        assert half.get(kind, "all") == cfg.DATASET.SUBSAMPLE_CLASSES
        assert args.eval_only == kind.endswith("_test")
        models = {"base2new_test": PLACES["base2new_train"], "xd_test": "imagenet/{t}/" + f"{DEFAULT}_16shots"}
        model = models.get(kind, "").format(t=TRAINERS[folder])
        assert args.model_dir == (f"/o/{model}/seed3" if model else "")
        if kind == "dg":
            assert tuple(cfg.DATASET.TARGET_DOMAINS) == ("sketch", "photo")
            assert tuple(cfg.DATASET.SOURCE_DOMAINS) == ("art", "cartoon")


def test_shell_scripts_take_variables() -> None:
    own = {"DATA": "/d", "OUTPUT": "/o", "BASE": "MaPLe", "CFG": "vit_b16_c2_ep5_batch4_2ctx", "SHOTS": "4"}
    args, cfg = parsed(script("coopood/main", "waterbirds", 1, "--dry-run", **own))
    assert cfg.OUTPUT_DIR == "/o/waterbirds/CoOpOOD-MaPLe/vit_b16_c2_ep5_batch4_2ctx_4shots/seed1"
    assert args.config_file.endswith("configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml")
    assert (cfg.TRAINER.BASE, cfg.DATASET.NUM_SHOTS) == ("MaPLe", 4)
    args, cfg = parsed(script("ravl/xd_test", "waterbirds", 1, "--dry-run", **own, SOURCE="celeba", LOADEP="5"))
    assert args.load_epoch == 5 and "/o/celeba/RaVL-MaPLe/" in args.model_dir
    _, cfg = parsed(script("ravl/main", "waterbirds", 1, "--dry-run", DATA="/d", NCTX="8", CSC="True", CTP="front"))
    keys = cfg.TRAINER.COOP
    assert (keys.N_CTX, keys.CSC, keys.CLASS_TOKEN_POSITION) == (8, True, "front")
    assert cfg.OUTPUT_DIR.endswith(f"{DEFAULT}_16shots/nctx8_cscTrue_ctpfront/seed1")
    _, cfg = parsed(script("debiasedpt/groups", "waterbirds", 1, "--dry-run", DATA="d", OUTPUT="o", SHOTS="2"))
    assert cfg.DATASET.ROOT == "//d" and f"//o/groups/waterbirds/DebiasedPT/{DEFAULT}_2shots/seed1" == cfg.OUTPUT_DIR


@pytest.mark.parametrize(
    ("name", "arguments", "variables", "message"),
    [
        ("coopood/main", ["waterbirds"], {"DATA": "/d"}, "usage: DATA=FOLDER bash"),
        ("coopood/main", ["waterbirds", 1], {}, "DATA is not set"),
        ("ravl/dg", ["pacs", 1, "photo"], {"DATA": "/d"}, "'TARGET ...' 'SOURCE ...'"),
        ("ravl/dg", ["pacs", 1, "photo", " "], {"DATA": "/d"}, "domains to test on and domains to train on"),
        ("ravl/groups", ["pacs", 1, "--base", "MaPLe"], {"DATA": "/d"}, "BASE=NAME in front"),
    ],
)
def test_shell_scripts_say_what_is_missing(
    name: str, arguments: list[Any], variables: dict[str, str], message: str
) -> None:
    done = script(name, *arguments, **variables)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_shell_script_runs_and_goes_on(data_root: Path, tmp_path: Path) -> None:
    """The command is started with its words as they are; what train.py's status is, is the script's."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\nexit 3\n')
    python.chmod(0o755)
    variables = {"DATA": str(data_root), "OUTPUT": str(tmp_path / "o"), "PYTHON": str(python)}
    done = script("coopood/groups", "shapes_on_scenes", 1, "DATASET.ATTRIBUTE_NAMES", "('a b',)", **variables)
    assert done.returncode == 3 and done.stdout.splitlines()[:2] == [
        f"Output: {tmp_path}/o/groups/shapes_on_scenes/CoOpOOD/{DEFAULT}/seed1",
        "train.py",
    ]
    assert done.stdout.splitlines()[-2:] == ["DATASET.ATTRIBUTE_NAMES", "('a b',)"]
    (tmp_path / "o" / "groups" / "shapes_on_scenes" / "CoOpOOD" / DEFAULT / "seed1").mkdir(parents=True)
    assert "is there: going on with it" in script("coopood/groups", "shapes_on_scenes", 1, **variables).stdout


# --- the environment ---------------------------------------------------------------------------------------------


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
