"""Names of classes."""

from __future__ import annotations

import pytest

from oodprompt.config.registry import Registry
from oodprompt.errors import UserError, nearest


class Apple:
    """A fruit."""


class Pear:
    """Another."""


def test_registry_by_decorator_and_by_call() -> None:
    registry = Registry("fruit")
    assert registry.register()(Apple) is Apple
    assert registry.register(Pear) is Pear
    assert registry.registered_names() == ["Apple", "Pear"]
    assert registry.get("Apple") is Apple
    with pytest.raises(KeyError, match="'Apple' is already registered"):
        registry.register()(Apple)
    other = type("Apple", (), {})
    registry.register(other, force=True)
    assert registry.get("Apple") is other


def test_unknown_names_suggest_the_nearest() -> None:
    registry = Registry("fruit")
    registry.register(Apple)
    with pytest.raises(UserError, match=r"^--fruit: unknown fruit 'aple': did you mean 'Apple'\? known: Apple$"):
        registry.get("aple", "--fruit")
    with pytest.raises(UserError, match="no fruit is named"):
        registry.get("")
    assert "did you mean" not in nearest("zzz", ["Apple"])
    assert "41 names" in nearest("x1", [f"x{i}" for i in range(41)])
