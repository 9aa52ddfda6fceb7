"""Everything of a Hugging Face folder beside the weights, and how the weights are cut into shards."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from endprompt.checkpoint.model_card import model_card
from endprompt.checkpoint.weights import SINGLE
from endprompt.errors import UserError
from endprompt.models.hf_config import extended_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling

DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
COPIED = (
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md",
)  # fmt: skip
"""Files of the source checkpoint that stay as they are. tokenizer_config.json is copied with its model_max_length raised."""

SETTINGS = "tokenizer_config.json"


def plan_shards(sizes: list[tuple[str, int]], limit: float) -> list[list[tuple[str, int]]]:
    """Cut (name, bytes) into shards of at most `limit` bytes, in order; a tensor larger than that gets one of its own."""
    plan: list[list[tuple[str, int]]] = [[]]
    for name, size in sizes:
        if plan[-1] and sum(s for _, s in plan[-1]) + size > limit:
            plan.append([])
        plan[-1].append((name, size))
    return plan


def shard_name(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def make_readable(path: Path) -> None:
    """safetensors creates files that only their owner may read; give them what the user's umask gives any other file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def write_companions(
    folder: Path,
    recipe: Recipe,
    config: dict[str, Any],
    rope: RopeScaling,
    *,
    dtype: str | None,
    step: int | None,
    source: Path | None = None,
    provenance: dict[str, str] | None = None,
) -> None:
    """Everything beside the weights of an extended model: config.json, tokenizer, generation config, model card.

    dtype: of the weights, None to keep what config.json says. step: optimizer steps trained, None for untrained weights.
    source: folder that tokenizer and the like are copied from, the recipe's model.path when left out. provenance: further
    lines of the model card.
    """
    extended = extended_config(config, rope, recipe.target_length)
    if dtype is not None:
        set_dtype(extended, dtype)
    (folder / "config.json").write_text(json.dumps(extended, indent=2) + "\n")
    copy_tokenizer(source or Path(recipe.model.path), folder, recipe.target_length)
    (folder / "README.md").write_text(model_card(recipe, rope, extended, step, provenance))


def set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write bf16 or fp32 under the old and the new key of transformers."""
    config.pop("torch_dtype", None)
    config |= {"torch_dtype": DTYPE_NAMES[dtype], "dtype": DTYPE_NAMES[dtype]}


def copy_tokenizer(source: Path, folder: Path, max_length: int | None) -> None:
    """Copy tokenizer, generation config and licence. max_length: new model_max_length in tokens, None to keep it."""
    for name in COPIED if max_length else (*COPIED, SETTINGS):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if max_length and (source / SETTINGS).is_file():
        settings = read_tokenizer_settings(source) | {"model_max_length": max_length}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def read_tokenizer_settings(source: Path) -> dict[str, Any]:
    """tokenizer_config.json. Raises UserError where it is no JSON object."""
    path = source / SETTINGS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(path, "holds no JSON object", "download the file again") from None
