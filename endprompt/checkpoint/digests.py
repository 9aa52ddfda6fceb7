"""Digests of tensors: against corruption and mix-ups, not against an adversary. Each names its algorithm: "xxh3_128:0f3c...".

sha256 takes 0.55 s of a core a GB (1.8 GB/s), as much as all other work of a conversion; xxh3_128 takes 0.04 s (25 GB/s). By chance
one changed tensor in 2^128 has the digest of the right one, but who wants to can make such a tensor. Small files (config.json,
.metadata) are digested with sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import xxhash

ALGORITHM = "xxh3_128"
"""What new conversions record."""

_MAKERS = {ALGORITHM: xxhash.xxh3_128, "sha256": hashlib.sha256}
"""What a record may be in. sha256 is what checkpoints before this module carry, without its name in front."""


class Digest:
    """Of bytes that come in parts, by each of `algorithms`."""

    def __init__(self, algorithms: Iterable[str] = (ALGORITHM,)):
        self._states = {name: _MAKERS[name]() for name in algorithms}

    def update(self, data: bytes | bytearray | memoryview) -> None:
        for state in self._states.values():
            state.update(data)

    def texts(self) -> dict[str, str]:
        """{algorithm: "algorithm:hexadecimal"}"""
        return {name: f"{name}:{state.hexdigest()}" for name, state in self._states.items()}

    def text(self) -> str:
        """The one of ALGORITHM."""
        return self.texts()[ALGORITHM]


def digest_of(text: str) -> str:
    digest = Digest()
    digest.update(text.encode())
    return digest.text()


def algorithm_of(text: str) -> str:
    """The name in front of a recorded digest. ValueError for one that this version cannot compute."""
    name, colon, _ = text.partition(":")
    if not colon or name not in _MAKERS:
        raise ValueError(f"{text[:40]!r} is of none of {', '.join(_MAKERS)}")
    return name
