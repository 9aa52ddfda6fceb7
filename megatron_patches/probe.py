"""The start-up probe on the model in hand: attention and rotary embedding do what the method needs, at this layout.

Influence is judged by bits, through the pipeline schedule that training uses: the loss of a token changes when anything that it
attends to changes, and not otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from endprompt.positions import Sample
from endprompt.training.probing import CHANGED_TOKENS, ProbeFailed, with_a_jump

LossOf = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], float]
"""(tokens, position_ids, labels, loss_weights), each [n], -> weighted loss, the same on every rank. Collective."""


@torch.no_grad()
def probe(loss_of: LossOf, sample: Sample, target_length: int, vocab_size: int) -> None:
    """Four forward passes over one sample (collective). Raises ProbeFailed.

    Labels and weights stay as they are while inputs change: only the loss of the tokens just after the last jump counts.
    """
    tokens, positions, jump = with_a_jump(sample, target_length)
    n = len(tokens)
    labels = np.concatenate([tokens[1:], tokens[:1]])
    weights = np.zeros(n, dtype=np.float32)
    weights[max(jump, n - CHANGED_TOKENS - 1) : n - 1] = 1  # without the last token, which is changed below

    def loss(tokens: np.ndarray, positions: np.ndarray) -> float:
        return loss_of(tokens, positions, labels, weights)

    usual = loss(tokens, positions)
    if not np.isfinite(usual):
        raise ProbeFailed(f"the loss of the first sample is {usual}: the weights hold NaN or infinity, or overflow in this precision")
    body = np.unique(np.linspace(0, jump - 1, min(CHANGED_TOKENS, jump)).astype(np.int64))
    other_body = tokens.copy()
    other_body[body] = (tokens[body] + 1) % vocab_size
    if loss(other_body, positions) == usual:
        raise ProbeFailed(f"the segment after the jump at index {jump} does not see the body")
    other_end = tokens.copy()
    other_end[-1] = (tokens[-1] + 1) % vocab_size
    if loss(other_end, positions) != usual:
        raise ProbeFailed("tokens see later tokens: attention is not causal")
    moved = positions.copy()
    moved[jump:] -= 1
    if loss(tokens, moved) == usual:
        raise ProbeFailed("moving the last segment changes nothing: the rotary embedding ignores position_ids")
