"""Random numbers that depend on (seed, purpose, epoch, ...) alone, so that resuming equals never having stopped."""

from __future__ import annotations

import random

import numpy as np
import torch


def derive_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed from ``seed`` and what it is for; different parts give independent streams."""
    entropy = [seed & 0xFFFFFFFFFFFFFFFF, *(part & 0xFFFFFFFFFFFFFFFF for part in parts)]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def set_random_seed(seed: int) -> None:
    """Seed Python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# What a derived seed is for; the numbers are part of reproducibility and never change their meaning.
FEW_SHOT, ORDER, AUGMENT, EPOCH, INIT, FIRST_STAGE, NOISE, SUBSET, HELD_OUT, HEAD, GROUP_SOURCE = range(11)
