"""What makes George fast where the number of its clusters is not the question."""

from __future__ import annotations

import functools

import pytest

from oodprompt.studies import baselines


@pytest.fixture
def few_mixtures(monkeypatch: pytest.MonkeyPatch) -> None:
    """George tries two and three clusters of a class and two parts of a cluster, not ten and five: it only takes longer."""
    monkeypatch.setattr(baselines, "_best_mixture", functools.partial(baselines._best_mixture, largest=3))
    monkeypatch.setattr(baselines, "_split_further", functools.partial(baselines._split_further, parts=2))
