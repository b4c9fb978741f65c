"""Randomness as a function of names, not of history: (seed, view, sample id) or (seed, step) gives one number.

That number seeds `random`, `numpy.random` and torch, so whatever a timm or torchvision transform draws, and
whatever dropout a step draws, is the same again in another process, batch, order or attempt.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from distill_cli.derive import derive

__all__ = ["derive", "preserved", "seed_everything", "uniforms"]


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


def uniforms(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """`count` numbers in [0, 1) of each seed, the same on every device: float32 `[len(seeds), count]`.

    By SplitMix64, whose n-th number is a function of the seed and n alone (Steele et al. 2014, OOPSLA, figure 16).

    Args:
        seeds: 0 to 2^63 - 1, as `derive` gives them.
    """
    # Products of int64 are taken modulo 2^64 on every device; shifts keep the sign, which the masks take away.
    state = torch.tensor(seeds, device=device)[:, None] + _GOLDEN * torch.arange(1, count + 1, device=device)
    mixed = (state ^ (state >> 30 & 2**34 - 1)) * _MIX[0]
    mixed = (mixed ^ (mixed >> 27 & 2**37 - 1)) * _MIX[1]
    return ((mixed ^ (mixed >> 31 & 2**33 - 1)) >> 40 & 2**24 - 1).float() / 2**24


def _signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
