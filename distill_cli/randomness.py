"""Randomness as a function of names, not of history: (seed, view, sample id) or (seed, step) gives one number.

That number seeds `random`, `numpy.random` and torch, so whatever a timm or torchvision transform draws, and
whatever dropout a step draws, is the same again in another process, batch, order or attempt.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from distill_cli.derive import derive

__all__ = ["derive", "preserved", "seed_everything"]


def seed_everything(number: int) -> None:
    """Seed `random`, `numpy.random` and torch's CPU generator."""
    random.seed(number)
    np.random.seed(number & 0xFFFFFFFF)
    torch.default_generator.manual_seed(number)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Leave the three generators as they were, whatever is drawn or seeded inside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
