#!/usr/bin/env python3
"""Extend a Hugging Face LLaMA checkpoint's context with DeepSpeed ZeRO-3.

    python ds_train.py --recipe recipes/llama3_8b_64k.yaml                 # one process per GPU of this machine
    python ds_train.py --recipe recipes/demo.yaml --nproc-per-node 2       # two CPU ranks over gloo
    torchrun --nnodes 8 --nproc-per-node 8 ... ds_train.py --recipe ...    # several nodes, on each of them
    python ds_train.py --recipe ... --dry-run --world-size 64              # check everything, train nothing

Running the same command again goes on from the newest checkpoint. Exit codes: 0 finished, 2 bad input (one line says
what), 75 saved and stopped on request (SIGUSR1, SIGTERM or a file STOP in the run folder): run it again; else a crash.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from endprompt.errors import run_command
from endprompt.recipe import Recipe, load_recipe
from endprompt.training.command import parse_arguments, processes_wanted
from endprompt.training.launch import become_single_process, launch, under_launcher
from endprompt.training.run_folder import RunFolder
from endprompt.training.stacks import write_stacks_on_request

if TYPE_CHECKING:
    from endprompt.training.stopping import StopRequests
    from endprompt.training.world import World
    from endprompt.zero3.prepare import Prepared


def main() -> int:
    arguments = parse_arguments(__doc__)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        return dry_run(recipe, arguments.world_size or processes_wanted(arguments))
    if not under_launcher():
        if (processes := processes_wanted(arguments)) > 1:
            return launch(processes)
        become_single_process()
    return train(recipe)


def dry_run(recipe: Recipe, world_size: int) -> int:
    from endprompt.training.prepare import check_run_folder
    from endprompt.zero3.checkpoints import ENGINE
    from endprompt.zero3.prepare import describe, prepare

    folder = RunFolder(recipe)
    prepared = prepare(recipe, world_size)
    check_run_folder(recipe, prepared, folder, ENGINE)
    print(describe(recipe, prepared, folder, world_size))
    print("dry run: everything checked, nothing trained")
    return 0


def train(recipe: Recipe) -> int:
    write_stacks_on_request()  # before torch is imported: that may hang too
    from endprompt.training import lifecycle
    from endprompt.training.stopping import StopRequests
    from endprompt.zero3.backend import init_distributed
    from endprompt.zero3.checkpoints import ENGINE
    from endprompt.zero3.prepare import prepare

    folder = RunFolder(recipe)
    stop = StopRequests(folder.stop_file)  # first: a signal during the minutes of loading must not kill
    world = init_distributed()
    with world.left_at_the_end(), lifecycle.claimed(recipe, folder, world, ENGINE, prepare) as prepared:
        return go_on(recipe, prepared, folder, stop, world)


def go_on(recipe: Recipe, prepared: Prepared, folder: RunFolder, stop: StopRequests, world: World) -> int:
    """Train from the newest checkpoint, or from the start, and export. Returns the exit code."""
    from endprompt.training import lifecycle
    from endprompt.zero3 import checkpoints
    from endprompt.zero3.engine import build_engine
    from endprompt.zero3.export import export
    from endprompt.zero3.load import load_model
    from endprompt.zero3.loop import Loop
    from endprompt.zero3.probe import probe

    start = lifecycle.find_start(folder, world)
    if start.step == recipe.steps and start.exported:
        return lifecycle.already_finished(recipe, folder, world, folder.export)
    reshape = start.saved is not None and start.saved.world_size != world.size
    source = checkpoints.make_universal(start.saved, world) if reshape else start.saved and start.saved.path

    model = load_model(recipe, prepared.config, prepared.rope, world)
    engine = build_engine(recipe, model, world.size, load_universal=reshape)
    probe(engine, prepared.train_data[0], recipe, prepared.architecture.vocab_size, world)
    if source:
        checkpoints.load(engine, source, start.step, prepared.micro_steps)

    monitor = lifecycle.open_monitor(recipe, folder, prepared, world, start.step)
    parameters = prepared.architecture.parameters
    loop = Loop(
        recipe, world, engine, prepared.train_data, prepared.validation_data,
        save=lambda step: checkpoints.save(engine, folder, recipe, step, parameters, prepared.data_fingerprint, world),
        stop_reason=lambda: stop.reason,
        monitor=monitor,
    )  # fmt: skip
    stopped_by = loop.run(start.step)
    if stopped_by is None:
        export(engine, recipe, prepared.config, prepared.rope, folder.export, world, recipe.steps)
    return lifecycle.close(folder, monitor, world, stopped_by, f"exported {folder.export}")


if __name__ == "__main__":
    run_command(main)
