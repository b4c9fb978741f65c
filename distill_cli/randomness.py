"""Randomness as a function of names, not of history: (seed, view, sample id) or (seed, step) gives one number.

That number seeds `random`, `numpy.random` and torch, so whatever a timm or torchvision transform draws, and
whatever dropout a step draws, is the same again in another process, batch, order or attempt.
"""

import contextlib
import hashlib
import random
import struct
from collections.abc import Iterator

import numpy as np
import torch


def derive(purpose: str, *parts: int) -> int:
    """A 63-bit number that depends on a purpose and on every part: BLAKE2b of 8-byte words, personalised.

    Args:
        purpose: at most 16 bytes; two purposes never share their numbers.
        parts: 0 to 2^64 - 1.
    """
    words = struct.pack(f"<{len(parts)}Q", *parts)
    digest = hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


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
