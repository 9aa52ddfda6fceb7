"""Extend a Hugging Face LLaMA checkpoint's context on Megatron-Core, at any TP x PP x VPP x CP x SP x DP layout.

    torchrun --nnodes 16 --nproc-per-node 8 ... -m megatron_patches.train --recipe recipes/llama3_70b_128k.yaml
    python -m megatron_patches.train --recipe ... --nproc-per-node 2       # processes of this machine, GPUs or CPUs
    python -m megatron_patches.train --recipe ... --dry-run --world-size 128  # check and build everything, train nothing

Running the same command again goes on from the newest checkpoint, at the same or another layout. Exit codes: 0 finished,
2 bad input (one line says what), 75 saved and stopped on request (SIGUSR1, SIGTERM or a file STOP in the run folder): run it
again; else a crash.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from endprompt.errors import UserError, run_command
from endprompt.recipe import Recipe, load_recipe
from endprompt.training.command import parse_arguments, processes_wanted
from endprompt.training.launch import become_single_process, launch, under_launcher
from endprompt.training.run_folder import RunFolder
from endprompt.training.stacks import write_stacks_on_request

if TYPE_CHECKING:
    from endprompt.training.stopping import StopRequests
    from endprompt.training.world import World
    from megatron_patches.prepare import Prepared


def main() -> int:
    arguments = parse_arguments(__doc__)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        return dry_run(recipe, arguments.world_size or processes_wanted(arguments))
    if not under_launcher():
        if (processes := processes_wanted(arguments)) > 1:
            return launch(processes, [sys.executable, "-m", "megatron_patches.train", *sys.argv[1:]])
        become_single_process()
    return train(recipe)


def dry_run(recipe: Recipe, world_size: int) -> int:
    from endprompt.training.prepare import check_run_folder
    from megatron_patches.checkpoints import ENGINE
    from megatron_patches.dry_run import describe_stages
    from megatron_patches.prepare import describe, prepare

    folder = RunFolder(recipe)
    prepared = prepare(recipe, world_size)
    check_run_folder(recipe, prepared, folder, ENGINE)
    print(describe(recipe, prepared, folder, describe_stages(recipe, prepared)))
    print("dry run: everything checked, nothing trained")
    return 0


def train(recipe: Recipe) -> int:
    write_stacks_on_request()  # before Megatron is imported: that may hang too
    from endprompt.training import lifecycle
    from endprompt.training.stopping import StopRequests
    from megatron_patches.engine import init_distributed
    from megatron_patches.prepare import prepare

    folder = RunFolder(recipe)
    stop = StopRequests(folder.stop_file)  # first: a signal during the minutes of loading must not kill
    world = init_distributed()
    from megatron_patches.checkpoints import ENGINE  # imports Megatron: only now, with the CPU backend where there is no GPU

    with world.left_at_the_end(), lifecycle.claimed(recipe, folder, world, ENGINE, prepare) as prepared:
        return go_on(recipe, prepared, folder, stop, world)


def go_on(recipe: Recipe, prepared: Prepared, folder: RunFolder, stop: StopRequests, world: World) -> int:
    """Train from the newest checkpoint, or from the start. Returns the exit code."""
    import megatron_patches
    from endprompt.training import lifecycle
    from megatron_patches.checkpoints import Checkpoints, check_same_optimizer
    from megatron_patches.engine import build_engine, init_parallel
    from megatron_patches.load import load_weights
    from megatron_patches.loop import Loop
    from megatron_patches.model import build_model
    from megatron_patches.probe import probe

    start = lifecycle.find_start(folder, world)
    if start.saved:
        check_same_optimizer(start.saved, recipe)
    if start.step == recipe.steps:
        return lifecycle.already_finished(recipe, folder, world, start.saved.path)

    megatron_patches.apply(recipe)
    init_parallel(prepared.layout)
    chunks = build_model(recipe, prepared.architecture, prepared.layout, prepared.config)
    load_weights(chunks, recipe, prepared.architecture, world)
    engine = build_engine(recipe, prepared.layout, chunks)
    checkpoints = Checkpoints(engine, folder, recipe, prepared, world)
    if start.saved:
        checkpoints.load(start.saved.path)

    def stop_reason() -> str | None:
        checkpoints.poll()
        return stop.reason

    monitor = lifecycle.open_monitor(recipe, folder, prepared, world, start.step)
    loop = Loop(
        recipe, world, engine, prepared.train_data, prepared.validation_data,
        save=checkpoints.save, stop_reason=stop_reason, monitor=monitor,
    )  # fmt: skip
    probe(loop.loss_of, prepared.train_data[0], recipe.target_length, prepared.architecture.vocab_size)
    try:
        stopped_by = loop.run(start.step)
    except UserError:  # shared by all ranks: a save under way is good, and the message sends the user to it
        checkpoints.wait()
        raise
    checkpoints.wait()
    trained = folder.checkpoints / f"step_{recipe.steps:08d}"
    return lifecycle.close(folder, monitor, world, stopped_by, f"trained {trained}")


if __name__ == "__main__":
    run_command(main)
