"""Pseudo-random choices as pure functions of their arguments, the same under every version of every library.

numpy keeps no promise that a Generator gives the same permutation in its next release, and a resumed run must not
depend on that. splitmix64 is Vigna's mixer (prng.di.unimi.it/splitmix64.c).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = 2**64 - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_ROUNDS = 6


def splitmix64(x: int) -> int:
    """A bijection of the 64-bit integers that mixes all bits."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MIX_1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX_2) & _MASK
    return x ^ (x >> 31)


def key_of(purpose: str) -> int:
    """A 64-bit key for a purpose spelt out in words, for instance "order 42 0 3"."""
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def hash_numbers(purpose: str, count: int) -> np.ndarray:
    """uint64 [count]: splitmix64(key_of(purpose) ^ i) for i = 0 .. count - 1."""
    with np.errstate(over="ignore"):
        x = (np.arange(count, dtype=np.uint64) ^ np.uint64(key_of(purpose))) + np.uint64(_GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX_2)
        return x ^ (x >> np.uint64(31))


class Permutation:
    """A pseudo-random order of 0 .. size - 1, evaluated at one place in 10 us and stored nowhere.

    A Feistel network permutes the smallest 4^b >= size numbers; results outside of the range go through it again
    (cycle walking, fewer than 4 times on average), which leaves a permutation of the range.
    """

    def __init__(self, size: int, key: int):
        self.size, self.key = size, key
        self.half = max(1, ((size - 1).bit_length() + 1) // 2)

    def __getitem__(self, place: int) -> int:
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} in an order of {self.size}")
        half, mask = self.half, (1 << self.half) - 1
        while True:
            left, right = place >> half, place & mask
            for round_ in range(_ROUNDS):
                left, right = right, left ^ (splitmix64(self.key ^ (round_ << 48) ^ right) & mask)
            place = left << half | right
            if place < self.size:
                return place
