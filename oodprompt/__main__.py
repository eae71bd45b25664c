"""``oodprompt VERB ...``: the commands of an installed package, also as ``python -m oodprompt``."""

# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

import oodprompt
from oodprompt.errors import nearest

# verb -> (module with ``main(argv) -> int``, what it does)
VERBS = {
    "train": ("oodprompt.cli", "train a prompt learner or a debiaser, and evaluate it"),
    "audit": ("oodprompt.auditing.command", "find shortcuts by name in a data set or a trained model"),
    "discover": ("oodprompt.discovering", "show which image regions a trained model wrongly goes by"),
    "predict": ("oodprompt.predict", "classify new images with a trained model"),
    "features": ("oodprompt.extracting", "write the image features of a data set to one file"),
    "export": ("oodprompt.serving.command", "write a trained run as one file (safetensors, ONNX)"),
    "compare": ("oodprompt.comparing", "show several runs on one page"),
    "benchmark": ("oodprompt.runs.benchmark", "train many runs and make tables of them"),
    "collect": ("oodprompt.runs.collect", "make tables over seeds of runs that are there"),
    "backbones": ("oodprompt.list_backbones", "list the CLIPs that can be named"),
    "datasets": ("oodprompt.list_datasets", "list the data sets and the files that each expects"),
    "cache": ("oodprompt.cache", "list and prune image features that are kept on disk"),
    "doctor": ("oodprompt.doctor", "check the installation"),
}


def usage() -> str:
    """What ``oodprompt --help`` prints."""
    lines = "\n".join(f"  {verb:<11} {what}" for verb, (_, what) in VERBS.items())
    return (
        f"usage: oodprompt VERB ...\n\n{lines}\n\n"
        "`oodprompt VERB --help` says what a verb takes; `oodprompt --version` says which version this is.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns its exit status, 2 for an unknown one."""
    # Threads that wait for work sleep instead of spinning; read by OpenMP when torch is first imported (oodprompt.cli).
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    words = list(sys.argv[1:] if argv is None else argv)
    _complete()
    verb = words[0] if words else ""
    if verb in VERBS:
        return importlib.import_module(VERBS[verb][0]).main(words[1:])
    if verb in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if verb in ("-V", "--version", "version"):
        print(f"oodprompt {oodprompt.__version__}")
        return 0
    print(f"error: unknown verb {verb!r}: {nearest(verb, VERBS)}\n" if verb else usage(), end="", file=sys.stderr)
    return 2


def _complete() -> None:
    """Answer a shell that asks for completions (argcomplete sets the variable); returns where none does."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    with contextlib.suppress(ImportError):  # argcomplete is an extra
        from oodprompt.completion import answer

        answer({verb: module for verb, (module, _) in VERBS.items()})


if __name__ == "__main__":
    sys.exit(main())
