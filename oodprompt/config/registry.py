"""Names for trainers, data sets, evaluators, sources of groups and backbones, as Dassl keeps them."""

from __future__ import annotations

from typing import Any

from oodprompt.errors import UserError, nearest


class Registry:
    """A dict of classes by name. ``@REGISTRY.register()`` puts a class in under its ``__name__``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._objects: dict[str, Any] = {}

    def register(self, obj: Any = None, force: bool = False, name: str = "") -> Any:
        """Register ``obj`` under ``name``, or return a decorator that does.

        A taken name raises ``KeyError`` unless ``force``.
        """

        def add(obj: Any) -> Any:
            key = name or obj.__name__
            if key in self._objects and not force:
                raise KeyError(f"a {self.kind} named {key!r} is already registered; use register(force=True)")
            self._objects[key] = obj
            return obj

        return add if obj is None else add(obj)

    def get(self, name: str, where: str = "") -> Any:
        """The object of that name; ``UserError`` with the nearest known name when there is none."""
        if name not in self._objects:
            prefix = f"{where}: " if where else ""
            problem = f"unknown {self.kind} {name!r}" if name else f"no {self.kind} is named"
            raise UserError(f"{prefix}{problem}: {nearest(name, self._objects)}")
        return self._objects[name]

    def registered_names(self) -> list[str]:
        return sorted(self._objects)

    def __contains__(self, name: str) -> bool:
        return name in self._objects

    def items(self) -> list[tuple[str, Any]]:
        return sorted(self._objects.items())


TRAINER_REGISTRY = Registry("trainer")
DATASET_REGISTRY = Registry("data set")
EVALUATOR_REGISTRY = Registry("evaluator")
GROUP_SOURCE_REGISTRY = Registry("source of groups")
BACKBONE_REGISTRY = Registry("backbone")
