"""Prompts, chosen patches and regions in towers that are not ours: what enters their blocks is changed on the way.

A tower of another library is a module that takes images or token ids. Where its blocks are is seen by watching one pass:
they are a list of modules of one class that are called once each, in order, with tokens [B, L, w]. Hooks put prompts among
these tokens, take some of them out, and remove the prompts behind the last block. The tower's own code stays as it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from oodprompt.backbones.boxes import Patches


@dataclass(frozen=True)
class Blocks:
    """The blocks of a tower: their ``names`` in it, and the ``length`` and ``width`` of what they take, [B, length, width].

    Of an image tower the last ``side`` x ``side`` tokens are patches, row by row. ``entrance`` is the norm ahead of the
    first block where there is one, as in CLIP's ViT, else that block.
    """

    names: tuple[str, ...]
    length: int
    width: int
    entrance: str

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return isqrt(self.length)

    @property
    def ahead(self) -> int:
        """Tokens ahead of the patches, such as the class token."""
        return self.length - self.side**2

    @contextlib.contextmanager
    def changed(
        self,
        tower: nn.Module,
        prompts: Tensor | None = None,
        deep: Sequence[Tensor] = (),
        at: int | None = None,
        chosen: Patches | None = None,
    ) -> Iterator[None]:
        """``tower`` meanwhile sees other tokens in its blocks.

        ``prompts`` [M, w] enter at place ``at`` (None: ahead of the patches) and leave behind the last block. ``deep``
        prompts [M, w] take the place of the M tokens from ``at`` on, ahead of blocks 1, 2, .... ``chosen`` patches of r
        regions, all of which count, make r rows of the B images: the tokens ahead of the patches, and those patches.
        """
        blocks, entrance = [tower.get_submodule(name) for name in self.names], tower.get_submodule(self.entrance)
        place, number = self.ahead if at is None else at, 0 if prompts is None else len(prompts)
        with contextlib.ExitStack() as hooks:

            def ahead_of(block: nn.Module, change: Callable[[Tensor], Tensor], ropes: bool = False) -> None:
                hook: Any = partial(_enter, change, _rows_of(chosen) if ropes else None)
                hooks.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)

            if chosen is not None:
                ahead_of(entrance, partial(_choose, chosen, self.ahead))
                for block in blocks:
                    ahead_of(block, _same, ropes=True)
            if prompts is not None:
                ahead_of(entrance, partial(_insert, prompts, place))
                hooks.callback(blocks[-1].register_forward_hook(partial(_leave, place, number)).remove)
                hooks.enter_context(_more_ahead(blocks, number))
            for block, own in zip(blocks[1:], deep, strict=False):
                ahead_of(block, partial(_replace, own, place))
            yield


def _enter(
    change: Callable[[Tensor], Tensor],
    rows: Callable[[Tensor], Tensor] | None,
    block: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What enters a block, with ``change``; rotary positions by ``rows``."""
    if rows is not None and isinstance(kwargs.get("rope"), Tensor):
        kwargs = {**kwargs, "rope": rows(kwargs["rope"])}
    return (change(args[0]), *args[1:]), kwargs


def _same(x: Tensor) -> Tensor:
    return x


def _insert(prompts: Tensor, place: int, x: Tensor) -> Tensor:
    return torch.cat([x[:, :place], prompts.to(x.dtype).expand(x.shape[0], -1, -1), x[:, place:]], dim=1)


def _replace(prompts: Tensor, place: int, x: Tensor) -> Tensor:
    return _insert(prompts, place, torch.cat([x[:, :place], x[:, place + len(prompts) :]], dim=1))


def _choose(chosen: Patches, ahead: int, x: Tensor) -> Tensor:
    patches = x[chosen.image.unsqueeze(1), ahead + chosen.index]
    return torch.cat([x[chosen.image, :ahead], patches], dim=1)


def _rows_of(chosen: Patches | None) -> Callable[[Tensor], Tensor] | None:
    """Rotary positions [N, k] or, by heads, [H, N, k] -> those of chosen patches, [r, 1 or H, n, k]."""
    if chosen is None:
        return None
    index = chosen.index
    return lambda rope: rope[index].unsqueeze(1) if rope.ndim == 2 else rope[:, index].transpose(0, 1)


def _leave(place: int, number: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The output of the last block without the prompts."""
    x = output if isinstance(output, Tensor) else output[0]
    x = torch.cat([x[:, :place], x[:, place + number :]], dim=1)
    return x if isinstance(output, Tensor) else (x, *output[1:])


@contextlib.contextmanager
def _more_ahead(blocks: Sequence[nn.Module], number: int) -> Iterator[None]:
    """Blocks with rotary positions know how many tokens have none: ``number`` more."""
    parts: list[Any] = [part for block in blocks for part in block.modules() if hasattr(part, "num_prefix_tokens")]
    for part in parts:
        part.num_prefix_tokens += number
    try:
        yield
    finally:
        for part in parts:
            part.num_prefix_tokens -= number


def find_blocks(tower: nn.Module, call: Callable[[], object]) -> Blocks | None:
    """The blocks of ``tower``, which ``call`` sends two inputs through; None where there are none."""
    lists, norms = _lists(tower, call)
    found = [
        (names, shapes[0])
        for names, shapes in lists
        if len({type(tower.get_submodule(name)) for name in names}) == 1
        and len(set(shapes)) == 1
        and len(shapes[0]) == 3
        and shapes[0][0] == 2
    ]
    if not found:
        return None
    names, shape = max(found, key=lambda entry: len(entry[0]))  # the outermost of equals
    before = norms[names[0]]
    entrance = before[0] if before and before[1] == shape else names[0]
    return Blocks(names, shape[1], shape[2], entrance)


class _Stop(Exception):
    """What follows in a tower is not wanted."""


@dataclass(frozen=True)
class LastStage:
    """The last stage of a convolutional tower: its ``name``, and the ``side`` n of the maps that it takes.

    These are [B, c, n, n], or [B, n, n, c] with ``channels_last``.
    """

    name: str
    side: int
    channels_last: bool

    def maps(self, tower: nn.Module, images: Tensor) -> Tensor:
        """What enters the stage, [B, c, n, n]. What follows in ``tower`` is not computed."""
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0])
            raise _Stop

        with self._hook(tower, keep), contextlib.suppress(_Stop):
            tower(images)
        return seen[0].permute(0, 3, 1, 2) if self.channels_last else seen[0]

    def rest(self, tower: nn.Module, maps: Tensor, image: Tensor) -> Tensor:
        """What ``tower`` makes of other maps [r, c, n, n]: features [r, d]. ``image`` [1, 3, R, R] is any."""
        maps = maps.permute(0, 2, 3, 1) if self.channels_last else maps
        with self._hook(tower, lambda module, args: (maps, *args[1:])):
            return tower(image)

    @contextlib.contextmanager
    def _hook(self, tower: nn.Module, hook: Any) -> Iterator[None]:
        handle = tower.get_submodule(self.name).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def find_last_stage(tower: nn.Module, call: Callable[[], object]) -> LastStage | None:
    """The last stage of a convolutional tower, which ``call`` sends two images through; None where there is none.

    A stage is one of three or more modules that are called once each, in order, with ever smaller maps.
    """
    found = []
    for names, shapes in _lists(tower, call)[0]:
        first, last = shapes[0], shapes[-1]
        maps = all(len(shape) == 4 and shape[0] == 2 for shape in shapes)
        if len(names) >= 3 and maps and last[2] < first[2] and last[2] in (last[1], last[3]):
            found.append(LastStage(names[-1], last[2], last[2] != last[3]))
    return min(found, key=lambda stage: stage.side, default=None)  # the others are within the first stages


# Names of modules and the shape of what they take.
_Called = tuple[str, tuple[int, ...]]


def _lists(
    tower: nn.Module, call: Callable[[], object]
) -> tuple[list[tuple[tuple[str, ...], list[tuple[int, ...]]]], dict[str, _Called | None]]:
    """Lists of modules that ``call`` calls once each, in order: their names and the shapes of what they take.

    With it, by name of a module in a list, the norm that is called last ahead of it.
    """
    lists = [
        [f"{name}.{child}" if name else child for child, _ in module.named_children()]
        for name, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module)
    ]
    calls: list[_Called] = []
    members = {name for names in lists for name in names}
    norms: dict[str, _Called | None] = {}
    last: list[_Called | None] = [None]

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        shape = tuple(args[0].shape) if args and isinstance(args[0], Tensor) else ()
        if name in members:
            calls.append((name, shape))
            norms.setdefault(name, last[0])
        if isinstance(module, nn.LayerNorm):
            last[0] = name, shape

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, module in tower.named_modules():
            if name in members or isinstance(module, nn.LayerNorm):
                hooks.callback(module.register_forward_pre_hook(partial(note, name)).remove)
        call()
    result = []
    for names in lists:
        own = [(name, shape) for name, shape in calls if name in names]
        if [name for name, _ in own] == names:
            result.append((tuple(names), [shape for _, shape in own]))
    return result, norms


def works(call: Callable[[], Tensor], rows: int) -> bool:
    """Whether ``call`` gives features [rows, d]: towers whose blocks need all tokens, or no others, raise an error."""
    try:
        with torch.no_grad():
            features = call()
    except Exception:  # of whatever kind the tower raises
        return False
    return features.ndim == 2 and len(features) == rows
