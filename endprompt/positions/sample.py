"""What a position scheme makes of a piece of text: one training sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One training sample of n = physical_length tokens, in physical order. The attention mask follows that order.

    tokens: int64 [n].
    position_ids: int64 [n], strictly increasing, in [0, target_length); they turn the rotary phases and nothing else.
    loss_weights: float32 [n]; loss_weights[i] weighs the loss of PREDICTING token i, so loss_weights[0] is 0.
    """

    tokens: np.ndarray
    position_ids: np.ndarray
    loss_weights: np.ndarray
