"""Random streams by name. Nothing draws from a global generator: every draw is a function of (seed,
names)."""

import hashlib
import os
import random
from collections.abc import Sequence

MASK = (1 << 63) - 1


def derive_seed(*names: object) -> int:
    """A 63-bit seed that depends on every name and on their order; equal names give an equal seed
    on every rank."""
    text = "\x1f".join(str(name) for name in names)
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") & MASK


def uniform(*names: object) -> float:
    """One draw from [0, 1) that is a function of the names alone."""
    # 53 bits, what a float holds: all 63 could round up to 1.
    return (derive_seed(*names) >> 10) / (1 << 53)


def stream(*names: object) -> random.Random:
    """A generator of its own, seeded from the names."""
    return random.Random(derive_seed(*names))


def drawn(keys: Sequence[str], count: int, *names: object) -> list[int]:
    """Places of `count` of the keys, or of all if there are fewer, in order. A key is drawn by
    itself: a larger count has all of a smaller one, and keys that come or go elsewhere move
    nothing."""
    order = sorted(range(len(keys)), key=lambda i: (uniform("drawn", *names, keys[i]), i))
    return sorted(order[:count])


def global_seed(seed: int | None = None) -> int:
    """The given seed, or that of `seed_everything`, or 0."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
