"""Many runs in one process, in step: the prompts of all are encoded by one call of the text tower.

Each run executes its own command line in a thread of its own, with its own folder, log, random numbers, schedule,
checkpoints and errors. One thread runs at a time. A run stops in each training step when
its prompts are to be encoded. When all have stopped, the prompts of R runs are encoded at once. Each run then goes on with
its own features:

    encode([p_1; ...; p_R]) = [encode(p_1); ...; encode(p_R)]

The gradients of the features are collected the same way, and one backward pass gives each run those of its own prompts,
as no number of a run depends on another's prompts. A run equals the run alone but for the order in which sums are made.

A device that computes backward passes in threads of its own, as a GPU does, cannot wait in them: this is for the CPU.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oodprompt.backbones import CLIP
from oodprompt.backbones.casts import autocast_dtype
from oodprompt.backbones.company import COMPANY


@dataclass(frozen=True)
class Part:
    """One run of several: the file that it prints to, what it does (returns the exit status), and a first line there."""

    log: Path
    work: Callable[[], int]
    head: str = ""


def run_together(parts: Sequence[Part]) -> list[int]:
    """Do the work of all parts in this process; their exit statuses."""
    return _Company(parts).run()


class _Own:
    """What a process has one of, as one of its runs has set it: streams, and states of random numbers."""

    def __init__(self) -> None:
        self.streams = sys.stdout, sys.stderr
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def put_back(self) -> None:
        sys.stdout, sys.stderr = self.streams
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


# --- what runs ask for -------------------------------------------------------------------------------------------------


@dataclass
class _Prompts:
    """Prompts to encode: prefix [P, e] and suffixes [C, S, e], of which one is ``learned``, without their graph."""

    clip: CLIP
    prefix: Tensor
    suffix: Tensor
    lengths: tuple[int, ...]
    prefix_is_learned: bool
    autocast: torch.dtype | None
    turn: int = 0

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(self.lengths)

    def goes_with(self, other: _Prompts) -> bool:
        """Whether both differ in nothing but the values that are learned."""
        if (
            self.clip is not other.clip
            or self.lengths != other.lengths
            or self.prefix_is_learned != other.prefix_is_learned
            or self.autocast != other.autocast
            or (self.prefix.shape, self.prefix.dtype) != (other.prefix.shape, other.prefix.dtype)
            or (self.suffix.shape, self.suffix.dtype) != (other.suffix.shape, other.suffix.dtype)
        ):
            return False
        return (
            self.prefix_is_learned
            and torch.equal(self.suffix, other.suffix)
            or (not self.prefix_is_learned and torch.equal(self.prefix, other.prefix))
        )


class _Call:
    """One call of the text tower for the prompts of several runs, and the graph behind its ``features`` [R, C, d]."""

    def __init__(self, asked: Sequence[_Prompts]) -> None:
        first = asked[0]
        self.asked, self.classes = asked, len(first.lengths)
        with torch.enable_grad(), _autocast(first.autocast):
            if first.prefix_is_learned:
                self.learned = torch.stack([one.prefix for one in asked]).requires_grad_()
                self.features = first.clip.encode_prompts(self.learned, first.suffix, first.lengths)
            else:  # suffixes are those of R * C classes behind one prefix
                self.learned = torch.stack([one.suffix for one in asked]).requires_grad_()
                suffixes = self.learned.flatten(0, 1)
                features = first.clip.encode_prompts(first.prefix, suffixes, first.lengths * len(asked))
                self.features = features.unflatten(0, (len(asked), self.classes))

    def gradients(self, by_row: dict[int, Tensor]) -> Tensor:
        """Gradients of what the runs learn, [R, ...], for those of their features [C, d] by row (none: 0), in one pass."""
        whole = torch.zeros_like(self.features)
        for row, gradient in by_row.items():
            whole[row] = gradient
        # A run may ask again (ProGrad has two losses). The graph goes when the last run has let go of this call.
        (found,) = torch.autograd.grad(self.features, self.learned, whole, retain_graph=True)
        return found


@dataclass
class _Gradient:
    """The gradient [C, d] of the features that a run has in row ``row`` of ``call``."""

    call: _Call
    row: int
    gradient: Tensor


def _autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


class _Handed(torch.autograd.Function):
    """A run's row of the features of a call. Its backward pass waits for those of the other runs."""

    @staticmethod
    def forward(ctx: Any, learned: Tensor, member: _Member, call: _Call, row: int) -> Tensor:
        ctx.member, ctx.call, ctx.row = member, call, row
        return call.features.detach()[row].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.member.wait(_Gradient(ctx.call, ctx.row, gradient)), None, None, None


# --- runs --------------------------------------------------------------------------------------------------------------


class _Member:
    """A run: its thread, and what it waits for."""

    def __init__(self, company: _Company, part: Part) -> None:
        self.company, self.part = company, part
        self.asks: _Prompts | _Gradient | None = None
        self.answer: Any = None
        self.status: int | None = None  # when it has ended
        self.turn = threading.Lock()
        self.turn.acquire()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        COMPANY.set(self)
        status = 1
        try:
            with self.part.log.open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log:
                sys.stdout = sys.stderr = log
                if self.part.head:
                    print(self.part.head)
                status = self.part.work()
        finally:
            self.status = status
            self.company.baton.release()

    def go_on(self) -> None:
        """Let it run until it waits or ends."""
        streams = sys.stdout, sys.stderr
        self.turn.release()
        self.company.baton.acquire()
        sys.stdout, sys.stderr = streams

    def wait(self, asks: _Prompts | _Gradient) -> Any:
        """The answer to what it asks, when the others have run as far as they can. Called by its own thread."""
        own = _Own()
        self.asks = asks
        self.company.baton.release()
        self.turn.acquire()
        own.put_back()
        answer, self.answer = self.answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    # --- as of ``oodprompt.backbones.company`` -----------------------------------------------------------------

    @property
    def size(self) -> int:
        return len(self.company.members)

    def shared(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self.company.kept:
            self.company.kept[key] = make()
        return self.company.kept[key]

    def encode(self, clip: CLIP, prefix: Tensor, suffix: Tensor, lengths: tuple[int, ...]) -> Tensor | None:
        if not torch.is_grad_enabled() or prefix.requires_grad == suffix.requires_grad or prefix.device.type != "cpu":
            return None
        if self.company.number_running < 2 or clip.text_projection.requires_grad:
            return None
        own = suffix[:, : max(lengths)]
        asks = _Prompts(
            clip, prefix.detach(), own.detach(), lengths, prefix.requires_grad, autocast_dtype(prefix.device)
        )
        place = self.wait(asks)
        return _Handed.apply(prefix if prefix.requires_grad else own, self, *place) if place else None


@dataclass
class _Company:
    """Runs that go together. ``kept``: what they share, by its key."""

    parts: Sequence[Part]
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.baton = threading.Lock()  # held by the scheduler while a member runs; released when it stops
        self.baton.acquire()
        self.members = [_Member(self, part) for part in self.parts]
        self._turns = itertools.count()

    @property
    def number_running(self) -> int:
        return sum(member.status is None for member in self.members)

    def run(self) -> list[int]:
        """Do all work; the exit statuses."""
        own = _Own()
        try:
            for member in self.members:
                own.put_back()
                member.thread.start()
                self._let_run([member])
            while waiting := [member for member in self.members if member.asks is not None]:
                self._let_run(self._answer(waiting))
        except BaseException:
            self._interrupt()
            raise
        finally:
            own.put_back()
        return [1 if member.status is None else member.status for member in self.members]

    def _let_run(self, members: Sequence[_Member]) -> None:
        for member in members:
            member.asks = None
            member.go_on()
            if isinstance(member.asks, _Prompts):
                member.asks.turn = next(self._turns)

    def _answer(self, waiting: Sequence[_Member]) -> list[_Member]:
        """Answer some of those that wait, gradients first; who they are."""
        gradients = [(member, member.asks) for member in waiting if isinstance(member.asks, _Gradient)]
        if gradients:
            call = gradients[0][1].call
            members = {asks.row: member for member, asks in gradients if asks.call is call}
            self._differentiate(call, members, {asks.row: asks.gradient for _, asks in gradients if asks.call is call})
            return [*members.values()]
        prompts = [(member, member.asks) for member in waiting if isinstance(member.asks, _Prompts)]
        first = min((asks for _, asks in prompts), key=lambda asks: asks.turn)
        group = [(member, asks) for member, asks in prompts if asks is first or asks.goes_with(first)]
        group = group[: max(1, first.clip.tokens_at_once // first.tokens)]
        if len(group) > 1:  # one alone does it itself
            self._encode([member for member, _ in group], [asks for _, asks in group])
        return [member for member, _ in group]

    def _encode(self, members: Sequence[_Member], asked: Sequence[_Prompts]) -> None:
        try:
            call = _Call(asked)
        except (RuntimeError, MemoryError):
            return  # each by itself takes less memory, or says in its own words what is wrong
        for row, member in enumerate(members):
            member.answer = call, row

    def _differentiate(self, call: _Call, members: dict[int, _Member], gradients: dict[int, Tensor]) -> None:
        try:
            found = call.gradients(gradients)
        except (RuntimeError, MemoryError) as error:
            for member in members.values():  # each says so in its own words
                member.answer = type(error)(*error.args)
            return
        for row, member in members.items():
            member.answer = found[row]

    def _interrupt(self) -> None:
        """End every run as Ctrl-C does. The one that is running is let on until it waits."""
        for member in self.members:
            while member.status is None and member.thread.is_alive():
                if member.asks is None:  # it is running
                    self.baton.acquire()
                    continue
                member.asks, member.answer = None, KeyboardInterrupt()
                with contextlib.suppress(RuntimeError):
                    member.go_on()
