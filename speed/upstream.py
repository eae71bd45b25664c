"""Times upstream's own training steps beside ours: ``python speed/upstream.py FOLDER --trainer CoOp --classes 100``.

FOLDER holds checkouts of Dassl.pytorch, CoOp and multimodal-prompt-learning; none of their code is copied here. Their
trainer is built over the same random weights, class names and batch size as ours, with the keys of their own yaml file,
and its ``forward_backward`` is timed as ours is. What is mended from outside, so that it runs on a current torch and
without a data set: Dassl's known breakages (``oodprompt.plugin``), the download of weights, and MaPLe's first
projection, which upstream keeps in half precision also where the rest is in fp32, so that neither fp32 nor amp runs.

One JSON line per implementation and setting. ``ratio`` is upstream's ``step_s`` in the same precision over ours;
``ratio_fp16`` that of upstream in fp16, which its files ask for, over ours in amp.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import json
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from oodprompt.errors import UserError
from oodprompt.terminal import exit_status

sys.path.insert(0, str(Path(__file__).resolve().parent))
import one_case  # noqa: E402
import step_time  # noqa: E402

# Trainer -> checkout, module, class, yaml file of its experiments, and the keys that its train.py adds.
TRAINERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "CoOp": (
        "CoOp",
        "trainers.coop",
        "configs/trainers/CoOp/vit_b16.yaml",
        {"N_CTX": 16, "CSC": False, "CTX_INIT": "", "PREC": "fp16", "CLASS_TOKEN_POSITION": "end"},
    ),
    "CoCoOp": (
        "CoOp",
        "trainers.cocoop",
        "configs/trainers/CoCoOp/vit_b16_c4_ep10_batch1_ctxv1.yaml",
        {"N_CTX": 16, "CTX_INIT": "", "PREC": "fp16"},
    ),
    "MaPLe": (
        "multimodal-prompt-learning",
        "trainers.maple",
        "configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml",
        {"N_CTX": 2, "CTX_INIT": "a photo of a", "PREC": "fp16", "PROMPT_DEPTH": 9},
    ),
}
BATCH = {"CoOp": 32, "CoCoOp": 1, "MaPLe": 4}  # of their yaml files
ADDRESSES = (
    "https://github.com/KaiyangZhou/Dassl.pytorch",
    "https://github.com/KaiyangZhou/CoOp",
    "https://github.com/muzairkhattak/multimodal-prompt-learning",
)


def find_checkouts(folder: Path, name: str) -> ModuleType:
    """Upstream's module of a trainer. ``UserError`` where a checkout is not in ``folder``."""
    repository, module, file, _ = TRAINERS[name]
    for place, needed in (("Dassl.pytorch", "dassl/__init__.py"), (repository, file)):
        if not (folder / place / needed).is_file():
            raise UserError(f"{folder / place} is no checkout of upstream; clone {', '.join(ADDRESSES)} into {folder}")
    # Theirs come first: this checkout has folders named trainers and datasets, too.
    sys.path[:0] = [str(folder / repository), str(folder / "Dassl.pytorch")]
    importlib.import_module("oodprompt.plugin")  # mends Dassl
    return importlib.import_module(module)


class Upstream:
    """Upstream's trainer, ready to step; in place of ours for ``one_case.whole_steps``."""

    def __init__(self, module: ModuleType, folder: Path, case: dict[str, Any], weights: Path) -> None:
        from dassl.config import get_cfg_default
        from yacs.config import CfgNode

        name, precision = case["trainer"], case["precision"]
        repository, _, yaml, keys = TRAINERS[name]
        cfg = get_cfg_default()
        section = name.upper()
        cfg.TRAINER[section] = CfgNode(keys)
        cfg.merge_from_file(str(folder / repository / yaml))
        cfg.TRAINER[section].PREC, cfg.TRAINER.NAME = precision, name
        cfg.TRAINER[section].CTX_INIT = ""  # as ours in this comparison
        trainer = getattr(module, name).__new__(getattr(module, name))
        importlib.import_module("dassl.engine.trainer").TrainerBase.__init__(trainer)  # without a data set
        trainer.cfg = cfg
        on_gpu = case["device"] != "cpu" and torch.cuda.is_available()
        trainer.device = torch.device("cuda" if on_gpu else "cpu")
        trainer.dm = SimpleNamespace(dataset=SimpleNamespace(classnames=one_case.class_names(case["classes"])))
        trainer.check_cfg(cfg)
        with mock.patch.object(module.clip, "_download", lambda *args: str(weights)):
            trainer.build_model()
        if precision != "fp16" and hasattr(trainer.model.prompt_learner, "proj"):
            trainer.model.prompt_learner.proj.float()
        trainer.set_model_mode("train")
        trainer.num_batches, trainer.batch_idx = sys.maxsize, -1
        self.trainer, self.device = trainer, trainer.device
        images = torch.randn(case["batch"], 3, *cfg.INPUT.SIZE, generator=torch.Generator().manual_seed(1))
        label = torch.arange(case["batch"]) % case["classes"]
        self.batch = {"img": images.pin_memory() if on_gpu else images, "label": label}

    def step(self) -> None:
        self.trainer.batch_idx += 1
        self.trainer.forward_backward(self.batch)


def half_weights(trainer: Any, folder: Path) -> Path:
    """The frozen weights of our trainer in a file as OpenAI's are: in OpenAI's layout and in fp16."""
    file = folder / "weights.pt"
    torch.save({key: value.half().cpu() for key, value in trainer.clip.state_dict().items()}, file)
    return file


def clear() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def compare(args: argparse.Namespace) -> None:
    """Print a line for upstream in each precision, then for ours in each precision, cache and way to compile."""
    module = find_checkouts(args.folder.resolve(), args.trainer)
    batch = args.batch or BATCH[args.trainer]
    words = ["--trainer", args.trainer, "--classes", str(args.classes), "--batch", str(batch), "--device", args.device]
    words += ["--steps", str(args.steps), *(["--compile", *args.compile] if args.compile else [])]
    for flag in ("seconds", "warm_up", "layers"):
        if getattr(args, flag) is not None:
            words += [f"--{flag.replace('_', '-')}", str(getattr(args, flag))]
    words += ["--precision", *(p for p in args.precision if p != "fp16")]
    caches = ("off",) if args.trainer == "MaPLe" else ("auto", "off")
    ours = [case for c in caches for case in step_time.plan(step_time.parser().parse_args([*words, "--cache", c]), [])]

    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(sys.stderr):
            weights = half_weights(one_case.build(ours[0], Path(folder)), Path(folder))
        clear()
        theirs: dict[str, float] = {}
        for precision in args.precision:
            case = {**ours[0], "implementation": "upstream", "precision": precision, "cache": "off", "compile": None}
            line = case | time_upstream(module, args.folder.resolve(), case, weights)
            theirs[precision] = line.get("step_s", 0)
            show(line)
    for case in ours:
        line = case | one_case.answer_and_clear(case)
        if line.get("step_s"):
            line["ratio"] = round(theirs.get(case["precision"], 0) / line["step_s"], 2) or None
            if case["precision"] == "amp" and theirs.get("fp16"):
                line["ratio_fp16"] = round(theirs["fp16"] / line["step_s"], 2)
        show(line)


def time_upstream(module: ModuleType, folder: Path, case: dict[str, Any], weights: Path) -> dict[str, Any]:
    """Times and peak of upstream's step, or an error."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            upstream = Upstream(module, folder, case, weights)
            found = one_case.whole_steps(
                upstream.step, upstream.device, case["steps"], case["seconds"], case["warm_up"]
            )
        return one_case.where(upstream.device) | found
    except Exception as error:  # another precision may run
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    finally:
        clear()


def show(line: dict[str, Any]) -> None:
    columns = (*step_time.COLUMNS, "ratio", "ratio_fp16", "error")
    print(json.dumps({key: line[key] for key in columns if line.get(key) is not None}), flush=True)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="holds upstream's checkouts")
    parser.add_argument("--trainer", choices=tuple(TRAINERS), default="CoOp")
    parser.add_argument("--classes", type=int, default=100, metavar="C", help="default: 100")
    parser.add_argument("--batch", type=int, metavar="B", help="images per step (default: that of upstream's file)")
    parser.add_argument("--precision", nargs="+", choices=("amp", "fp32", "fp16"), default=["fp32"], metavar="P")
    parser.add_argument("--compile", nargs="+", metavar="C", help="values of TRAIN.COMPILE, for ours")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--layers", type=int, metavar="L", help="blocks of each tower (default: 12)")
    parser.add_argument("--steps", type=int, default=10, metavar="N", help="timed steps, at most (default: 10)")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="fewer steps, of which at least 3, in about S seconds"
    )
    parser.add_argument("--warm-up", type=int, metavar="N", help="steps ahead of the timed ones (default: 2, GPU: 10)")
    return parser


if __name__ == "__main__":
    sys.exit(exit_status(lambda: compare(parser().parse_args())))
