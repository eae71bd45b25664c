"""Tests that need a GPU: ``pytest -m gpu tests/gpu``. ``OODPROMPT_GPU_TESTS=cpu`` runs them on the CPU in its place."""

from __future__ import annotations

import pytest

from tests.helpers.devices import device_of_tests


@pytest.fixture
def device() -> str:
    """``cuda``; the test is skipped where there is none."""
    return device_of_tests()
