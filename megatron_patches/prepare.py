"""What the Megatron engine checks beyond `endprompt.training.prepare`: versions, layout, kernels; and its part of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt.errors import UserError
from endprompt.models.layout import Layout, check_layout
from endprompt.recipe import Recipe
from endprompt.training import prepare as shared
from endprompt.training.prepare import Inputs, read_inputs
from endprompt.training.run_folder import RunFolder
from megatron_patches.guards import check_version


@dataclass(frozen=True)
class Prepared(Inputs):
    layout: Layout
    one_layout: bool  # every sample has the same positions


def prepare(recipe: Recipe, world_size: int) -> Prepared:
    """Check everything that can be checked before a weight is read. Seconds for any model. Raises UserError."""
    check_version()
    from megatron_patches.model import check_kernels

    inputs = read_inputs(recipe)
    layout = check_layout(recipe, inputs.architecture, world_size)
    one_layout = inputs.train_data.builder.one_layout
    check_kernels(recipe, one_layout)
    check_exclusive(recipe)
    return Prepared(**vars(inputs), layout=layout, one_layout=one_layout)


def check_exclusive(recipe: Recipe) -> None:
    """Raises UserError for settings that this engine cannot honour together."""
    if recipe.megatron.async_save and recipe.output.save_interval < 2:
        raise UserError(
            "recipe: output.save_interval", "of 1 leaves a background save no time", "raise it or set megatron.async_save: false"
        )


def describe(recipe: Recipe, prepared: Prepared, folder: RunFolder, stages: list[str]) -> str:
    """The dry run's table. stages: one line per pipeline stage (`dry_run.describe_stages`)."""
    layout, training = prepared.layout, recipe.training
    batch = (
        f"{training.global_batch_size} samples = {training.micro_batch_size} x {layout.micro_steps} micro-steps x {layout.data} "
        "data-parallel ranks"
    )
    table = "one for all samples" if prepared.one_layout else "one per sample"
    rows = [("layout", f"{layout} = {layout.world_size} ranks"), ("batch", batch), ("rotary", f"{table}, {recipe.rope.type}")]
    rows += [("" if number else "a rank", line) for number, line in enumerate(stages)]
    return shared.describe(recipe, prepared, folder, rows)
