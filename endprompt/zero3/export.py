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
from endprompt.checkpoint.companions import make_readable, plan_shards, shard_name, write_companions
from endprompt.checkpoint.weights import INDEX
from endprompt.errors import UserError
from endprompt.models.hf_config import extended_config, load_hf_config, rope_of_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, scaling_for
from endprompt.training.world import World
from endprompt.zero3.model import hf_name

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


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
