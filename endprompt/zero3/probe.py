"""The start-up probe: before a run spends hours, prove on the loaded model that attention does what the method needs.

Run in train mode with the run's own activation checkpointing, because that is where transformers' packed-sequence
detection strikes (see attention.py); a plain forward with a cache would pass. Influence is judged by bits: a token that is
attended to changes at least the last bits of later logits, one that is masked changes none.
"""

from __future__ import annotations

import numpy as np
import torch

from endprompt.positions import Sample
from endprompt.recipe import Recipe
from endprompt.training.probing import CHANGED_TOKENS, ProbeFailed, with_a_jump
from endprompt.training.world import World


@torch.no_grad()
def probe(engine, sample: Sample, recipe: Recipe, vocab_size: int, world: World) -> None:
    """Three forward passes over one sample, the same on every rank (collective). Raises ProbeFailed.

    1. Replacing body tokens changes the logits of the displaced segment: it sees the body across the jump.
    2. Replacing the last token changes no logits before it: attention is causal by physical index.
    3. Moving the displaced segment by one position changes its logits: the rotary embedding follows position_ids.
    """
    tokens, positions, jump = with_a_jump(sample, recipe.target_length)
    n = len(tokens)
    terminal = torch.arange(max(jump, n - CHANGED_TOKENS - 1), n - 1, device=world.device)  # without the last token

    def logits(tokens: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        batch = {"input_ids": torch.from_numpy(tokens)[None], "position_ids": torch.from_numpy(positions)[None]}
        return engine(**{name: tensor.to(world.device) for name, tensor in batch.items()}, logits_at=terminal)

    engine.train()
    usual = logits(tokens, positions)
    body = np.unique(np.linspace(0, jump - 1, min(CHANGED_TOKENS, jump)).astype(np.int64))
    other_body = tokens.copy()
    other_body[body] = (tokens[body] + 1) % vocab_size
    if torch.equal(logits(other_body, positions), usual):
        raise ProbeFailed(
            f"the segment after the jump at index {jump} does not see the body: attention takes the jump for a document boundary"
        )
    other_end = tokens.copy()
    other_end[-1] = (tokens[-1] + 1) % vocab_size
    if not torch.equal(logits(other_end, positions), usual):
        raise ProbeFailed("tokens see later tokens: attention is not causal")
    moved = positions.copy()
    moved[jump:] -= 1
    if torch.equal(logits(tokens, moved), usual):
        raise ProbeFailed("moving the last segment changes nothing: the rotary embedding ignores position_ids")
