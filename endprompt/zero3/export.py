"""From a ZeRO-3 engine to a Hugging Face folder: sharded safetensors, config with the extended rope, tokenizer, model card.

Peak host memory beyond training is one shard on one rank; shards are written by the ranks in turn.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from endprompt.atomic import atomic_directory
from endprompt.checkpoint.weights import INDEX, SINGLE
from endprompt.errors import UserError
from endprompt.models.hf_config import extended_config, load_hf_config, rope_of_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, scaling_for
from endprompt.training.world import World
from endprompt.zero3.model import hf_name
from endprompt.zero3.model_card import model_card

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DTYPE_NAMES = {"bf16": "bfloat16", "fp32": "float32"}
COPIED = (
    "tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "LICENSE", "LICENSE.txt", "USE_POLICY.md",
)  # fmt: skip
"""Files of the source checkpoint that stay as they are. tokenizer_config.json is copied with its model_max_length raised."""


@torch.no_grad()
def export(engine, recipe: Recipe, config: dict[str, Any], rope: RopeScaling, target: Path, world: World, step: int) -> None:
    """Write the engine's weights as a checkpoint that plain transformers loads. Collective; `target` appears whole or not at all.

    config: the source checkpoint's config.json. Raises UserError when the disk is too small.
    """
    partial = target.with_name(f".{target.name}.partial")
    parameters = [(hf_name(name), parameter) for name, parameter in engine.module.named_parameters()]
    plan = plan_shards(
        [(name, p.ds_numel * DTYPES[recipe.output.export_dtype].itemsize) for name, p in parameters], recipe.output.export_shard_gb * 1e9
    )
    world.on_rank_0(lambda: _begin(partial, target, sum(size for shard in plan for _, size in shard)))
    by_name = dict(parameters)
    with _whole_parameters(engine):
        for number, shard in enumerate(plan):
            _write_shard(
                partial / shard_name(number, len(plan)), [(name, by_name[name]) for name, _ in shard], number % world.size, recipe, world
            )
    dist.barrier()
    world.on_rank_0(lambda: _finish(partial, target, plan, recipe, config, rope, step))


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


@contextmanager
def _whole_parameters(engine) -> Iterator[None]:
    """DeepSpeed's own guard around reads of all parameters: ends prefetches that are under way."""
    engine.optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        engine.optimizer.checkpoint_event_epilogue()


def _write_shard(path: Path, parameters: list, writer: int, recipe: Recipe, world: World) -> None:
    import deepspeed

    tensors = {}
    for name, parameter in parameters:
        with deepspeed.zero.GatheredParameters([parameter]):  # one tensor at a time
            if world.rank == writer:
                tensors[name] = parameter.detach().to("cpu", DTYPES[recipe.output.export_dtype], copy=True).contiguous()
    if world.rank == writer:
        save_file(tensors, path, metadata={"format": "pt"})
        make_readable(path)


def make_readable(path: Path) -> None:
    """safetensors creates files that only their owner may read; give them what the user's umask gives any other file."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _begin(partial: Path, target: Path, size: int) -> None:
    if target.exists():
        raise UserError(target, "exists already", "move it away; the run's weights are in its checkpoints and are exported again")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    free = shutil.disk_usage(partial).free
    if free < 1.02 * size:
        raise UserError(
            target, f"needs {size / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free", "free disk space and run the same command again"
        )


def _finish(partial: Path, target: Path, plan: list, recipe: Recipe, config: dict[str, Any], rope: RopeScaling, step: int) -> None:
    if len(plan) > 1:
        weight_map = {name: shard_name(number, len(plan)) for number, shard in enumerate(plan) for name, _ in shard}
        total = sum(size for shard in plan for _, size in shard)
        (partial / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n")
    write_companions(partial, recipe, config, rope, dtype=recipe.output.export_dtype, step=step)
    for path in partial.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    os.rename(partial, target)


def write_companions(
    folder: Path, recipe: Recipe, config: dict[str, Any], rope: RopeScaling, *, dtype: str | None, step: int | None
) -> None:
    """Everything beside the weights: config.json, tokenizer, generation config, model card.

    dtype: of the weights, None to keep what config.json says. step: optimizer steps trained, None for untrained weights.
    """
    extended = extended_config(config, rope, recipe.target_length)
    if dtype is not None:
        extended.pop("torch_dtype", None)
        extended |= {"torch_dtype": DTYPE_NAMES[dtype], "dtype": DTYPE_NAMES[dtype]}  # the old and the new key of transformers
    (folder / "config.json").write_text(json.dumps(extended, indent=2) + "\n")
    source = Path(recipe.model.path)
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    settings = source / "tokenizer_config.json"
    if settings.is_file():
        (folder / settings.name).write_text(
            json.dumps(json.loads(settings.read_text()) | {"model_max_length": recipe.target_length}, indent=2) + "\n"
        )
    (folder / "README.md").write_text(model_card(recipe, rope, extended, step))


def export_untrained(recipe: Recipe, target: Path) -> None:
    """The source checkpoint under the recipe's rope, not trained: what interpolation does by itself. Weights are hard-linked
    where the file system can, else copied. Raises UserError."""
    source = Path(recipe.model.path)
    config = load_hf_config(source)
    rope = scaling_for(recipe, rope_of_config(config))
    with atomic_directory(target) as folder:
        for path in [*source.glob("*.safetensors"), *source.glob(INDEX)]:
            try:
                os.link(path.resolve(), folder / path.name)  # a link to a link (the HF cache is full of them) would dangle
            except OSError:  # another file system, or one without links
                shutil.copyfile(path, folder / path.name)
        write_companions(folder, recipe, config, rope, dtype=None, step=None)


def ensure_untrained(recipe: Recipe, target: Path) -> None:
    """`export_untrained` unless `target` holds it already. Raises UserError where it was made under another rope."""
    if not target.exists():
        return export_untrained(recipe, target)
    config = load_hf_config(recipe.model.path)
    expected = extended_config(config, scaling_for(recipe, rope_of_config(config)), recipe.target_length)
    if load_hf_config(target) != expected:
        raise UserError(target, "was made under another recipe", "remove it, or choose another output folder")
