"""Checks of a recipe that span several sections. Each raises ValueError with `field: problem; fix`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from endprompt.recipe.schema import Recipe


def check_lengths(recipe: Recipe) -> None:
    """Lengths must fit into each other: displaced <= physical <= target, original <= target, factor covers the target."""
    positions, original, target = recipe.positions, recipe.model.original_length, recipe.target_length
    physical = positions.physical_length
    if target < original:
        raise ValueError(f"target_length: {target} is below model.original_length {original}; raise it, extension only grows a window")
    if physical > target:
        raise ValueError(f"positions.physical_length: {physical} is above target_length {target}; lower it")
    if positions.scheme == "full" and physical != target:
        raise ValueError(f"positions.physical_length: scheme full trains at target_length {target}, found {physical}; set it to {target}")
    if positions.displaced_length is not None and positions.displaced_length >= physical:
        raise ValueError(f"positions.displaced_length: {positions.displaced_length} leaves no body in physical_length {physical}; lower it")
    covered = original * recipe.rope_factor * recipe.rope.interpolation
    if recipe.rope.type == "llama3" and recipe.rope.original_length:
        covered = max(original, recipe.rope.original_length * recipe.rope_factor) * recipe.rope.interpolation
    if recipe.rope.type in ("linear", "llama3") and covered < target:
        knob, now = ("interpolation", recipe.rope.interpolation) if recipe.rope.type == "llama3" else ("factor", recipe.rope_factor)
        fix = f"set it to {now * target / covered:g}"
        raise ValueError(f"rope.{knob}: {now:g} covers {covered:g} positions, target_length is {target}; {fix}")
    if recipe.training.tokens is not None and recipe.steps < 1:
        raise ValueError(f"training.tokens: {recipe.training.tokens} is less than one step of {recipe.tokens_per_step} tokens; raise it")
    if recipe.training.warmup_steps > recipe.steps:
        raise ValueError(f"training.warmup_steps: {recipe.training.warmup_steps} is above the {recipe.steps} steps of the run; lower it")
    if recipe.training.min_learning_rate > recipe.training.learning_rate:
        raise ValueError("training.min_learning_rate: is above training.learning_rate; lower it")
    if recipe.training.global_batch_size % recipe.training.micro_batch_size:
        raise ValueError(
            f"training.micro_batch_size: {recipe.training.micro_batch_size} does not divide global_batch_size "
            f"{recipe.training.global_batch_size}; choose a divisor"
        )
