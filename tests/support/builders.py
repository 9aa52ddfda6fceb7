"""A stand-in for SampleBuilder whose samples show the text that was read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from endprompt.positions import Sample


class PlainBuilder:
    """No scheme, no prompt; the weight of predicting token i of sample k is (k + i) / 8, exact in binary, 0 for i = 0."""

    def __init__(self, source_length: int, physical_length: int):
        self.source_length, self.positions = source_length, SimpleNamespace(physical_length=physical_length)

    def __call__(self, tokens: np.ndarray, index: int) -> Sample:
        assert tokens.dtype == np.int64 and len(tokens) == self.source_length
        weights = ((index + np.arange(len(tokens))) / 8).astype(np.float32)
        weights[0] = 0
        return Sample(tokens=tokens, position_ids=np.arange(len(tokens)) + 1000 * index, loss_weights=weights)
