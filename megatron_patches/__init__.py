"""Patches that make Megatron-Core train with per-token positions. In your own Megatron-LM script:

    import megatron_patches
    megatron_patches.apply("recipes/llama3_70b_128k.yaml")    # before the model and the datasets are built
    get_batch = megatron_patches.get_batch                     # instead of the script's own

and pass `megatron_patches.is_dataset_built_on_rank` to BlendedMegatronDatasetBuilder, so that every pipeline stage has
positions. `python -m megatron_patches.train` is this project's own entry point.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_patches.batches import get_batch, is_dataset_built_on_rank

if TYPE_CHECKING:
    from endprompt.recipe import Recipe

__all__ = ["apply", "get_batch", "is_dataset_built_on_rank", "remove"]

_originals: list[tuple[object, str, object]] = []


def apply(recipe: Recipe | str | Path | None = None) -> None:
    """Patch Megatron-Core: RoPE follows position_ids, and GPTDataset yields the recipe's samples.

    recipe: a recipe or its file; its rope takes the place of the model's own, its scheme that of arange. Without one, only
    RoPE is patched: it follows whatever position_ids the model is given. Calling it again changes the recipe.

    Raises UserError for a Megatron-Core that the patches were not written for; nothing is patched then.
    """
    from megatron_patches import datasets, rotary
    from megatron_patches.guards import check_patch, check_version

    check_version()
    builder, scaling = _read(recipe) if recipe is not None else (None, None)
    if not _originals:
        checked = [(patch, *check_patch(patch)) for patch in rotary.PATCHES + datasets.PATCHES]
        for patch, owner, original in checked:
            setattr(owner, patch.name, patch.replace(original))
            _originals.append((owner, patch.name, original))
    datasets.state.builder = builder
    rotary.state.set(one_layout=builder is not None and builder.one_layout, scaling=scaling)


def _read(recipe: Recipe | str | Path):
    from endprompt.models.hf_config import load_hf_config, rope_of_config
    from endprompt.recipe import Recipe, load_recipe
    from endprompt.rope import scaling_for
    from endprompt.training.prepare import sample_builder

    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    config = load_hf_config(recipe.model.path)
    return sample_builder(recipe, config["vocab_size"]), scaling_for(recipe, rope_of_config(config))


def remove() -> None:
    """Put every patched function back."""
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
