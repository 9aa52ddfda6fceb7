"""README.md of an export: how the checkpoint was made, from the recipe alone."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from endprompt import __version__
from endprompt.models.hf_config import oldest_transformers
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, describe

_PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers")


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def model_card(
    recipe: Recipe, rope: RopeScaling, config: dict[str, Any], step: int | None, provenance: dict[str, str] | None = None
) -> str:
    """Markdown with Hugging Face front matter. step: optimizer steps trained; None when the weights are the base's own.

    provenance: what else is known of the origin, one line each, for instance {"Weights": "xxh3_128:..."}.
    """
    base = Path(recipe.model.path).name
    physical = recipe.positions.physical_length
    if step is None:
        made = f"The weights are those of `{base}`, unchanged; only the rotary embedding is another. It is a baseline, not a trained model."
    else:
        made = (
            f"Trained for {step} steps of {recipe.training.global_batch_size} x {physical} tokens "
            f"({step * recipe.tokens_per_step:,} in all) with position scheme `{recipe.positions.scheme}`: "
            f"samples are {physical} tokens long, their position ids reach up to {recipe.target_length - 1}."
        )
    facts = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    versions = ", ".join([f"endprompt {__version__}", *(f"{name} {found}" for name in _PACKAGES if (found := _installed(name)))])
    origin = "".join(f"- {name}: {value}\n" for name, value in (provenance or {}).items())
    return f"""---
base_model: {base}
library_name: transformers
tags: [long-context, endprompt]
---

# {recipe.name}{" (untrained)" if step is None else ""}

`{base}` with its window extended from {recipe.model.original_length} to {recipe.target_length} positions.

{made}

- Rotary embedding: {describe(rope)}
- Needs transformers {oldest_transformers(config, rope, recipe.target_length)} or newer; older ones misread the rotary scaling.
- vLLM multiplies `max_position_embeddings` by the factor of linear scaling: pass `--max-model-len {recipe.target_length}`.
- Method: EndPrompt, arXiv 2605.14589. Made with {versions}.
{origin}
## Recipe

```yaml
{facts}```
"""
