"""One rank of tests/planning/test_megatron_memory_real.py: train as megatron_patches/train.py does, at one layout after another.

megatron_memory_rank.py JOBS OUT        RANK in the environment; JOBS: json list of {name, processes, recipe}
writes OUT/<name>.<rank>.json: {"by": {phase: peak within it of the growth of anonymous memory}, "saved"}, units of 10^9 bytes

saved: what autograd holds for backward, weights apart, where a step is one micro-batch of which nothing is recomputed.
processes: which of the launched processes are the job's ranks 0, 1, ... Phases: load (the model built and its weights read),
engine (gradient buffers, optimizer), train (all steps). Each job is a fork of a process that has Megatron imported and nothing
else, so that no job runs in memory that another one has freed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from tests.support.memory_rank import Growth, return_freed_blocks, saved_by_autograd


def main() -> None:
    jobs, out, process = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(os.environ["RANK"])
    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)  # its bf16 products, on CPUs with AVX-512 alone, hold 11 MB that are no need of the training
    from megatron_patches import cpu_backend

    cpu_backend.install()
    import transformers.models.auto.tokenization_auto  # noqa: F401

    from megatron_patches import load, loop, model, prepare  # noqa: F401

    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    for job in jobs:
        if process not in job["processes"]:
            continue
        if (pid := os.fork()) == 0:
            code = 1
            try:
                run(job, out, job["processes"].index(process))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        if os.waitpid(pid, 0)[1]:
            sys.exit(f"{job['name']} failed")


def run(job: dict, out: Path, rank: int) -> None:
    from endprompt.training.world import World

    store = f"file://{out}/{job['name']}.store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(job["processes"]))
    world = World.current()
    with world.left_at_the_end():
        (out / f"{job['name']}.{rank}.json").write_text(json.dumps(measure(job["recipe"], world)))


def measure(recipe_file: str, world) -> dict:
    """The growth is over what a rank holds before its model is built."""
    import megatron_patches
    from endprompt.recipe import load_recipe
    from megatron_patches.engine import build_engine, init_parallel
    from megatron_patches.load import load_weights
    from megatron_patches.loop import Loop
    from megatron_patches.model import build_model
    from megatron_patches.prepare import prepare

    recipe = load_recipe(recipe_file)
    prepared = prepare(recipe, world.size)
    megatron_patches.apply(recipe)
    init_parallel(prepared.layout)
    warm_up_math()
    return_freed_blocks()
    growth = Growth()

    def load():
        chunks = build_model(recipe, prepared.architecture, prepared.layout, prepared.config)
        load_weights(chunks, recipe, prepared.architecture, world)
        return chunks

    chunks = growth.phase("load", load, maps_files=True)
    engine = growth.phase("engine", lambda: build_engine(recipe, prepared.layout, chunks))
    loop = Loop(recipe, world, engine, prepared.train_data, None, save=lambda step: None, stop_reason=lambda: None, monitor=None)
    growth.phase("train", lambda: loop.run(0))
    plain = prepared.layout.micro_steps == 1 and not recipe.training.activation_checkpointing
    return {"by": growth.phases, "saved": saved_in_a_step(loop, chunks) if plain else None}


def warm_up_math() -> None:
    """Have the math library make its own buffers, and autograd its threads: 7 MB."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, 4, 64, 64, dtype=dtype, requires_grad=True)
        attended = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch.nn.functional.linear(attended, x[0, 0]).sum().backward()


def saved_in_a_step(loop, chunks) -> float:
    """Bytes of all unique storages that autograd saves, parameters apart."""
    apart = {parameter.untyped_storage().data_ptr() for chunk in chunks for parameter in chunk.parameters()}
    return saved_by_autograd(lambda: loop.optimizer_step(0, 0.0), apart) / 1e9


if __name__ == "__main__":
    main()
