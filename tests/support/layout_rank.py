"""One rank of tests/megatron_patches/test_layouts.py: the same training at one parallel layout after another.

layout_rank.py JOBS OUT        RANK in the environment; JOBS: json list of {name, ranks, recipe, overrides, fault}; writes OUT/<name>.json

Importing Megatron costs more than training this model, so eight processes stay and form a new world for each job; those
beyond its number of ranks wait for the next one.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    jobs, out, rank = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = "0"  # where there is a GPU, all share it
    from megatron_patches import cpu_backend, torch_adam

    cpu_backend.install()
    torch_adam.install()
    for job in jobs:
        if rank >= job["ranks"]:
            continue
        dist.init_process_group("gloo", init_method=f"file://{out}/{job['name']}.store", rank=rank, world_size=job["ranks"])
        try:
            result = run(job)
        except Exception as error:  # a planted fault: what it raised is the result
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        if rank == (job["ranks"] - 1 if job["fault"] == "no positions on the last stage" else 0):
            (out / f"{job['name']}.json").write_text(json.dumps(result))
        leave(job["fault"])


def run(job: dict) -> dict:
    import megatron_patches
    from endprompt.recipe import load_recipe
    from endprompt.training.schedule import learning_rate
    from endprompt.training.world import World
    from megatron_patches.engine import build_engine, init_parallel
    from megatron_patches.load import load_weights
    from megatron_patches.loop import Loop
    from megatron_patches.model import build_model
    from megatron_patches.prepare import prepare

    world = World.current()
    recipe = load_recipe(job["recipe"], job["overrides"])
    prepared = prepare(recipe, world.size)
    megatron_patches.apply(recipe)
    init_parallel(prepared.layout)
    plant(job["fault"])
    chunks = build_model(recipe, prepared.architecture, prepared.layout, prepared.config)
    load_weights(chunks, recipe, prepared.architecture, world)
    engine = build_engine(recipe, prepared.layout, chunks)
    callbacks = {"save": None, "stop_reason": None, "monitor": None}
    loop = Loop(recipe, world, engine, prepared.train_data, prepared.validation_data, **callbacks)
    steps = [loop.optimizer_step(step, learning_rate(recipe, step)) for step in range(recipe.steps)]
    return {"losses": [s[0] for s in steps], "norms": [s[1] for s in steps], "validation": loop.validate(), "layout": str(prepared.layout)}


PLANTED = []


def plant(fault: str | None) -> None:
    """Break one thing on purpose."""
    from megatron_patches import batches, load
    from megatron_patches import loop as loop_module

    stock = batches.context_slice, batches.KEYS, load.mark_split
    PLANTED.append(lambda: (setattr(batches, "context_slice", stock[0]), setattr(load, "mark_split", stock[2])))
    if fault == "positions in plain chunks":  # tokens zig-zagged, positions not

        def plain_positions(tensor, size, rank, dim=1):
            positions = tensor.dtype == torch.int64 and bool((tensor.diff(dim=1) > 0).all())
            return tensor.chunk(size, dim)[rank] if positions else stock[0](tensor, size, rank, dim)

        batches.context_slice = plain_positions
    elif fault == "positions of the wrong rank":
        batches.context_slice = lambda tensor, size, rank, dim=1: (
            stock[0](tensor, size, size - 1 - rank, dim)
            if tensor.dtype == torch.int64 and bool((tensor.diff(dim=1) > 0).all())
            else stock[0](tensor, size, rank, dim)
        )
    elif fault == "no positions on the last stage":
        from megatron.core import parallel_state

        get_batch = loop_module.get_batch
        PLANTED.append(lambda: setattr(loop_module, "get_batch", get_batch))

        def without(iterator):
            found = get_batch(iterator)
            return (*found[:4], None) if parallel_state.is_pipeline_last_stage() else found

        loop_module.get_batch = without
    elif fault == "unmarked parts":
        load.mark_split = lambda parameter, dimension: None


def leave(fault: str | None) -> None:
    from megatron.core import parallel_state

    while PLANTED:
        PLANTED.pop()()
    parallel_state.destroy_model_parallel()
    if fault != "no positions on the last stage":  # its other rank is still waiting for a gradient
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
