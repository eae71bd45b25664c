"""Shell completion of ``oodprompt`` by argcomplete: ``eval "$(register-python-argcomplete oodprompt)"``."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Mapping

import argcomplete


def answer(verbs: Mapping[str, str]) -> None:
    """Write the completions of the line that the shell asks about, and end the process.

    ``verbs``: verb -> its module, of which only the one on the line is imported.
    """
    words = os.environ.get("COMP_LINE", "").split()
    parser = argparse.ArgumentParser(prog="oodprompt")
    parser.add_argument("--version", action="store_true")
    parts = parser.add_subparsers()
    for verb, module in verbs.items():
        build = getattr(importlib.import_module(module), "build_parser", None) if verb in words[1:2] else None
        parts.add_parser(verb, parents=[build()] if build else [], add_help=build is None)
    argcomplete.autocomplete(parser)
