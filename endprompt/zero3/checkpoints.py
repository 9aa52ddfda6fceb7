"""How ZeRO-3 states go into a checkpoint folder and come back, at any number of ranks.

DeepSpeed writes its own `latest` before all ranks are done, so a kill can leave it naming a torn checkpoint. It is told not
to; `endprompt.training.checkpoints` keeps the pointer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from endprompt.atomic import sync_path
from endprompt.errors import UserError
from endprompt.recipe import Recipe
from endprompt.training.checkpoints import SavedState, begin_save, finish_save
from endprompt.training.run_folder import RunFolder
from endprompt.training.world import World

ENGINE = "deepspeed"


def save(engine, folder: RunFolder, recipe: Recipe, step: int, parameters: int, data: str, world: World) -> None:
    """Save a checkpoint of optimizer step `step` and move the pointer to it. Collective."""
    incomplete = begin_save(folder, recipe, step, parameters, world)
    engine.save_checkpoint(str(folder.checkpoints), tag=incomplete.name, client_state={"step": step}, save_latest=False)
    mine = (path for path in incomplete.iterdir() if f"rank_{world.rank}_" in path.name or world.rank == 0)
    for path in mine:
        sync_path(path)
    finish_save(folder, recipe, incomplete, {"step": step, "data": data, "engine": ENGINE}, world)


def make_universal(saved: SavedState, world: World) -> Path:
    """Convert a checkpoint to DeepSpeed's universal format, which loads at any number of ranks. Collective.

    The result lies beside the checkpoint and goes away with the next save.
    """
    universal = saved.path.with_name(saved.path.name + ".universal")
    world.on_rank_0(lambda: _convert(saved, universal))
    return universal


def _convert(saved: SavedState, universal: Path) -> None:
    if universal.exists():
        return
    partial = universal.with_name(universal.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(saved.path),
        "--output_folder",
        str(partial),
    ]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    finished = subprocess.run(command, env=alone, capture_output=True, text=True)
    if finished.returncode:
        reason = (finished.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(saved.path, f"cannot be converted for another number of ranks ({reason})", f"resume with {saved.world_size} ranks")
    os.rename(partial, universal)


def load(engine, path: Path, step: int, micro_steps_per_step: int) -> None:
    """Load weights and optimizer state from `path` (a checkpoint or its universal form). Collective."""
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise UserError(path, "DeepSpeed could not load this checkpoint", "write the name of an earlier one into checkpoints/latest")
    # DeepSpeed counts micro-steps to find the accumulation boundary; with another number of ranks their count per step differs.
    engine.micro_steps = step * micro_steps_per_step
    engine.global_steps = step
