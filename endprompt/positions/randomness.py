"""Random numbers of a sample: a pure function of (seed, sample index), in streams that do not disturb each other."""

from __future__ import annotations

import numpy as np

_STREAMS = {"prompt": 0, "quote": 1, "positions": 2, "text": 3}
"""prompt: which prompt is drawn; quote: what a recall prompt quotes; positions: where tokens go; text: which text is read.

Separate streams pair the arms of a comparison: whatever a scheme draws for its positions, sample k has the same prompt
(and the same quotes) under every scheme. The numbers are part of every finished run: append, never renumber.
"""


class Streams:
    """The random streams of sample `index` of a run with `seed`; both are integers >= 0."""

    def __init__(self, seed: int, index: int):
        self._entropy = (seed, index)

    def __getitem__(self, name: str) -> np.random.Generator:
        """A fresh generator at the beginning of stream `name`."""
        return np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(_STREAMS[name],)))
