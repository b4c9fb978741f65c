"""A number from names, without torch: what `randomness` seeds generators with, and a store's numbers are made of."""

import hashlib
import struct


def derive(purpose: str, *parts: int) -> int:
    """A 63-bit number that depends on a purpose and on every part: BLAKE2b of 8-byte words, personalised.

    Args:
        purpose: at most 16 bytes; two purposes never share their numbers.
        parts: 0 to 2^64 - 1.
    """
    words = struct.pack(f"<{len(parts)}Q", *parts)
    digest = hashlib.blake2b(words, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1
