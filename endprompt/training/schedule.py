"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from endprompt.recipe import Recipe


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0).

    Equal to transformers' `get_constant_schedule_with_warmup`, which the paper used, and to its cosine schedule except
    that ours ends at `min_learning_rate`. As there, warm-up step k has k / warmup_steps, so the very first step has 0.
    """
    training = recipe.training
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    if training.schedule == "constant_with_warmup":
        return training.learning_rate
    progress = (step - training.warmup_steps) / max(1, recipe.steps - training.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return training.min_learning_rate + (training.learning_rate - training.min_learning_rate) * cosine
