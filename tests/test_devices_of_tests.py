"""The tests themselves compute on the CPU unless those that need a GPU are chosen."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.devices import chooses_gpu_tests


@pytest.mark.parametrize("marks", ["", "slow", "not slow and not gpu", "not gpu", "pictures"])
def test_gpus_are_hidden_from_other_tests(marks: str) -> None:
    assert not chooses_gpu_tests(marks)


@pytest.mark.parametrize("marks", ["gpu", "gpu and slow", "slow or gpu", "gpu and not slow"])
def test_gpus_are_there_for_the_tests_that_need_them(marks: str) -> None:
    assert chooses_gpu_tests(marks)


def test_these_tests_see_no_gpu() -> None:
    assert not torch.cuda.is_available()
