"""From start to exit code: what every engine does around its loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from endprompt.errors import EXIT_INTERRUPTED
from endprompt.recipe import Recipe
from endprompt.training import hardware
from endprompt.training.checkpoints import SavedState, latest
from endprompt.training.monitor import Monitor
from endprompt.training.prepare import Inputs, check_run_folder
from endprompt.training.run_folder import RunFolder
from endprompt.training.world import World

Prepared = TypeVar("Prepared", bound=Inputs)


@contextlib.contextmanager
def claimed(recipe: Recipe, folder: RunFolder, world: World, engine: str, prepare: Callable[[Recipe, int], Prepared]) -> Iterator[Prepared]:
    """Everything checked on every rank and the run folder claimed by rank 0, for the length of the block. Collective.

    Yields what `prepare(recipe, ranks)` gives. A failure within the block is written to status.json on its way out.
    """
    prepared = world.together(lambda: prepare(recipe, world.size))
    patience = 300.0 if int(os.environ.get("SLURM_RESTART_COUNT") or 0) else 0.0
    world.on_rank_0(lambda: (check_run_folder(recipe, prepared, folder, engine), folder.claim(patience)))
    folder.check_shared(world)
    if note := hardware.note_on(recipe.training.precision):
        world.print(note)
    with folder.failures_recorded() if world.rank == 0 else contextlib.nullcontext():
        yield prepared


@dataclass(frozen=True)
class Start:
    """Where a run goes on. saved: the checkpoint, None for a new run. exported: whether export/ is there."""

    saved: SavedState | None
    exported: bool

    @property
    def step(self) -> int:
        return self.saved.step if self.saved else 0


def find_start(folder: RunFolder, world: World) -> Start:
    """Rank 0 looks for all: on a network file system another node may not see yet what was written a moment ago. Collective."""
    return world.on_rank_0(lambda: Start(latest(folder), (folder.export / "config.json").exists()))


def already_finished(recipe: Recipe, folder: RunFolder, world: World, result: object) -> int:
    """The run needs nothing more: say so, here and in status.json. Returns the exit code."""
    if world.rank == 0:
        folder.write_status(state="finished", step=recipe.steps, exit_code=0, error=None)
    world.print(f"finished already: {result}")
    return 0


def open_monitor(recipe: Recipe, folder: RunFolder, inputs: Inputs, world: World, start_step: int) -> Monitor | None:
    """Rank 0: bring the log back to the checkpoint, write recipe.yaml and status.json, start reporting. None elsewhere."""
    if world.rank != 0:
        return None
    folder.forget_steps_after(start_step)
    folder.write_recipe(recipe)
    starts = folder.read_status().get("starts", 0)
    folder.write_status(
        state="running", step=start_step, steps=recipe.steps, starts=starts + 1, exit_code=None, error=None, pid=os.getpid()
    )
    return Monitor(recipe, folder, inputs.architecture, world.device, world.size, start_step)


def close(folder: RunFolder, monitor: Monitor | None, world: World, stopped_by: str | None, result: str) -> int:
    """Write the last status and say how it ended. result: what a finished run has to show. Returns the exit code."""
    code = 0 if stopped_by is None else EXIT_INTERRUPTED
    if monitor:
        state = "finished" if stopped_by is None else "stopped" if stopped_by == "STOP file" else "interrupted"
        folder.write_status(state=state, exit_code=code)
        monitor.close()
    world.print(result if stopped_by is None else f"saved and stopped ({stopped_by}); run the same command to go on")
    return code
