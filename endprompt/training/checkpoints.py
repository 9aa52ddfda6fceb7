"""Checkpoints of a run, whichever engine writes the tensors: complete or invisible, the newest k kept, one pointer.

Ranks write into `step_N.incomplete`; when all are done rank 0 renames it to `step_N` and only then moves the pointer
`latest`. A kill at any moment leaves the pointer on a complete checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from endprompt.atomic import atomic_file, sync_path, write_json
from endprompt.errors import UserError
from endprompt.recipe import Recipe
from endprompt.recipe.schema import deciding_facts
from endprompt.training.run_folder import RunFolder
from endprompt.training.world import World


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Size of a checkpoint: fp32 master weight and two Adam moments (12 B), and the module's own copy (2 or 4 B)."""
    return parameters * (14 if recipe.training.precision == "bf16" else 16)


@dataclass(frozen=True)
class SavedState:
    """state.json of a checkpoint: what a resume must know before any tensor is read."""

    path: Path
    step: int
    world_size: int
    fingerprint: str
    recipe: dict
    data: str
    engine: str = "deepspeed"  # or "megatron"


def latest(folder: RunFolder) -> SavedState | None:
    """The checkpoint that the pointer names, None for a new run. Raises UserError where it is damaged."""
    pointer = folder.checkpoints / "latest"
    if not pointer.exists():
        return None
    path = folder.checkpoints / pointer.read_text().strip()
    try:
        saved = SavedState(path=path, **json.loads((path / "state.json").read_text()))
        if not (isinstance(saved.step, int) and isinstance(saved.world_size, int) and isinstance(saved.recipe, dict)):
            raise ValueError
        return saved
    except (OSError, ValueError, TypeError):
        names = [whole.name for whole in whole_checkpoints(folder) if whole != path and (whole / "state.json").exists()]
        fix = f"write one of {', '.join(names)} into it" if names else "remove the checkpoints folder to start again"
        raise UserError(pointer, f"names {path.name}, which is missing or damaged", fix) from None


def check_resumable(saved: SavedState, recipe: Recipe, data: str, engine: str) -> None:
    """Refuse to go on with another recipe, other data or another engine than the checkpoint was made with."""
    if saved.engine != engine:
        raise UserError(
            saved.path, f"was made by the {saved.engine} engine, not by {engine}", "start it again as before or set output.directory"
        )
    if saved.fingerprint != recipe.fingerprint():
        different = ", ".join(_differences(saved.recipe, recipe.model_dump(mode="json"))) or "the version of the recipe schema"
        raise UserError(
            saved.path,
            f"was made with another recipe (different: {different})",
            "restore those fields or set output.directory to a new folder",
        )
    if saved.data != data:
        raise UserError(saved.path, "was made with other data", "restore the data or set output.directory to a new folder")


def _differences(old: dict, new: dict) -> list[str]:
    before, after = deciding_facts(old), deciding_facts(new)
    fields = [field for field in sorted(before.keys() | after.keys()) if before.get(field) != after.get(field)]
    return [field if isinstance(before.get(field), list) else f"{field} {before.get(field)!r} -> {after.get(field)!r}" for field in fields]


def check_disk(folder: RunFolder, recipe: Recipe, parameters: int, *, copies: int = 1) -> None:
    """Raise UserError unless `copies` more checkpoints fit on the disk."""
    needed = copies * checkpoint_bytes(recipe, parameters)
    free = shutil.disk_usage(folder.path).free
    if free < needed:
        raise UserError(
            folder.checkpoints,
            f"needs {needed / 1e9:.1f} GB for {copies} more checkpoint(s), the disk has {free / 1e9:.1f} GB free",
            "free disk space, lower output.keep_last or set output.directory to another disk",
        )


def missing_copies(folder: RunFolder, recipe: Recipe) -> int:
    """Checkpoints that will be there at most (keep_last, and one being written) less those that are there."""
    return max(1, recipe.output.keep_last + 1 - len(whole_checkpoints(folder)))


def whole_checkpoints(folder: RunFolder) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.checkpoints.glob("step_*") if path.suffix == "")


def begin_save(folder: RunFolder, recipe: Recipe, step: int, parameters: int, world: World) -> Path:
    """The empty folder `step_N.incomplete` into which all ranks write. Collective; UserError where the disk is too small."""
    incomplete = folder.checkpoints / f"step_{step:08d}.incomplete"
    world.on_rank_0(lambda: _make_room(folder, recipe, incomplete, parameters))
    return incomplete


def finish_save(folder: RunFolder, recipe: Recipe, incomplete: Path, facts: dict, world: World) -> None:
    """Make `incomplete` the checkpoint that the pointer names, once every rank has flushed its files. Collective.

    facts: `step`, `data` and `engine`; the rest of state.json is known here.
    """
    dist.barrier()  # every rank's files are on the disk
    state = {**facts, "world_size": world.size, "fingerprint": recipe.fingerprint(), "recipe": recipe.model_dump(mode="json")}
    world.on_rank_0(lambda: _complete(folder, incomplete, state, recipe.output.keep_last))


def _make_room(folder: RunFolder, recipe: Recipe, incomplete: Path, parameters: int) -> None:
    check_disk(folder, recipe, parameters)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(incomplete, ignore_errors=True)
    incomplete.mkdir()


def _complete(folder: RunFolder, incomplete: Path, state: dict, keep_last: int) -> None:
    write_json(incomplete / "state.json", state)
    sync_path(incomplete)
    complete = incomplete.with_suffix("")
    shutil.rmtree(complete, ignore_errors=True)  # left by a kill between the next two lines
    os.rename(incomplete, complete)
    with atomic_file(folder.checkpoints / "latest") as file:
        file.write(complete.name + "\n")
    _remove_old(folder, complete, keep_last)


def _remove_old(folder: RunFolder, newest: Path, keep_last: int) -> None:
    """Keep `newest`, which the pointer names, and those before it. Later ones, left by a kill before the pointer moved or
    by a user who set it back, do not count: with them the one that is named could be among the oldest and go."""
    torn = list(folder.checkpoints.glob("step_*.incomplete"))
    universal = list(folder.checkpoints.glob("step_*.universal*"))
    up_to_newest = [path for path in whole_checkpoints(folder) if path.name <= newest.name]
    for path in up_to_newest[:-keep_last] + torn + universal:
        shutil.rmtree(path)
