"""What a program has one of, and a call of the library leaves as it found it; and whether the call says anything."""

from __future__ import annotations

import contextlib
import os
import random
import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from oodprompt.errors import UserError
from oodprompt.log import logger, quiet, show_messages, shows_messages

# What the command line calls otherwise than the functions.
_PARAMETERS = {
    "--output-dir": "output=",
    "--root": "root=",
    "--backbone": "backbone=",
    "--trainer": "method",
    "--base": "base=",
    "--config-file": "config_file=",
    "--dataset-config-file": "dataset_config_file=",
    "--load-epoch": "epoch=",
    "--model-dir": "the folder",
    "--import": "imports=",
    "--output": "output=",
    "--resume": "resume=",
    "--onnx": "onnx=",
    "--with-backbone": "with_backbone=True",
    "--images": "images=",
    "--split": "split=",
    "--vocabulary": "vocabulary=",
    "--sensitive": "sensitive=True",
    "--regions": "regions=True",
}


def _torch_settings() -> dict[str, Any]:
    cuda = torch.backends.cuda
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "benchmark": torch.backends.cudnn.benchmark,
        "matmul": cuda.matmul.allow_tf32,
        "convolutions": torch.backends.cudnn.allow_tf32,
        "cudnn_sdp": cuda.cudnn_sdp_enabled(),
        "threads": torch.get_num_threads(),
    }


def _set_torch(settings: dict[str, Any]) -> None:
    now = _torch_settings()
    if (now["deterministic"], now["warn_only"]) != (settings["deterministic"], settings["warn_only"]):
        torch.use_deterministic_algorithms(settings["deterministic"], warn_only=settings["warn_only"])
    torch.backends.cudnn.benchmark = settings["benchmark"]
    if now["matmul"] != settings["matmul"]:
        torch.backends.cuda.matmul.allow_tf32 = settings["matmul"]
    if now["convolutions"] != settings["convolutions"]:
        torch.backends.cudnn.allow_tf32 = settings["convolutions"]
    torch.backends.cuda.enable_cudnn_sdp(settings["cudnn_sdp"])
    if now["threads"] != settings["threads"]:
        torch.set_num_threads(settings["threads"])


class Processes:
    """The processes that a run computes with, as Accelerate keeps them for a whole program, between its calls."""

    def __init__(self) -> None:
        self._of_run: dict[str, Any] = {}

    @contextlib.contextmanager
    def here(self) -> Iterator[None]:
        """In the block those of the run, behind it those of the program."""
        shared = PartialState._shared_state
        of_program = dict(shared)
        _become(shared, self._of_run or of_program)
        try:
            yield
        finally:
            self._of_run = dict(shared)
            _become(shared, of_program)


def _become(shared: dict[str, Any], content: dict[str, Any]) -> None:
    shared.clear()
    shared.update(content)


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Random numbers, torch's settings, environment, working directory, warnings and the logger are put back afterwards."""
    python, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    settings, environment, folder = _torch_settings(), dict(os.environ), os.getcwd()
    handlers, level, hook = list(logger.handlers), logger.level, threading.excepthook
    try:
        with warnings.catch_warnings():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        elif torch.cuda.is_available() and torch.cuda.is_initialized():  # it started inside, from the program's seed
            torch.cuda.manual_seed_all(torch.initial_seed())
        _set_torch(settings)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        os.chdir(folder)
        threading.excepthook = hook
        logger.handlers[:] = handlers
        logger.setLevel(level)


@contextlib.contextmanager
def speaking(verbose: bool) -> Iterator[None]:
    """Whether the block prints what a command would; in a program that shows the messages of the package it does."""
    if verbose or shows_messages():
        show_messages()
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), quiet():
        show_messages()  # to nowhere, and to the log of a run
        yield


@contextlib.contextmanager
def call(processes: Processes, verbose: bool = False) -> Iterator[None]:
    """Around every call of the library; errors speak of its parameters, where those of the command line speak of flags."""
    try:
        with untouched(), processes.here(), speaking(verbose):
            yield
    except UserError as error:
        error.args = (_in_words_of_python(str(error)),)
        raise


def _in_words_of_python(text: str) -> str:
    for flag, parameter in _PARAMETERS.items():
        text = re.sub(rf"{flag}(?![\w-])", parameter, text)
    return text.removeprefix("command line: ")
