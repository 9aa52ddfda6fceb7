"""Megatron's torch_dist checkpoints in the run folder: any layout reads what any other has written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from endprompt.atomic import sync_path
from endprompt.errors import UserError
from endprompt.recipe import Recipe
from endprompt.training.checkpoints import begin_save, finish_save
from endprompt.training.prepare import Inputs
from endprompt.training.run_folder import RunFolder
from endprompt.training.world import World
from megatron_patches.engine import Engine
from megatron_patches.model import unwrapped

ENGINE = "megatron"


def check_same_optimizer(saved, recipe: Recipe) -> None:
    """Megatron names optimizer states differently with and without the distributed optimizer, and reads only its own."""
    before = saved.recipe["megatron"]["distributed_optimizer"]
    if before != recipe.megatron.distributed_optimizer:
        raise UserError(
            saved.path, f"was made with megatron.distributed_optimizer: {str(before).lower()}", "set it back or set output.directory"
        )


@contextlib.contextmanager
def write_failures(folder: RunFolder) -> Iterator[None]:
    """A writer's failure reaches all ranks as a CheckpointException, which is a BaseException: give it as bad input."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        last = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
        problem = f"a checkpoint cannot be written ({last[:200]})"
        raise UserError(folder.checkpoints, problem, "mend the disk and run the same command again") from None


class Checkpoints:
    """Saves and loads model and optimizer of an engine. With recipe.megatron.async_save files are written in the background.

    On disk: tensors under the names of `GPTModel.sharded_state_dict()`, optimizer states under `optimizer.`, state.json as
    every engine's, and the facts that a conversion to Hugging Face needs.
    """

    def __init__(self, engine: Engine, folder: RunFolder, recipe: Recipe, inputs: Inputs, world: World):
        self.engine, self.folder, self.recipe, self.inputs, self.world = engine, folder, recipe, inputs, world
        self._queue = None
        if recipe.megatron.async_save:
            from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

            self._queue = AsyncCallsQueue()

    def save(self, step: int) -> None:
        """Save a checkpoint of optimizer step `step` and move the pointer to it. Collective."""
        from megatron.core import dist_checkpointing

        self.wait()  # one at a time: the disk is asked for room for one more
        incomplete = begin_save(self.folder, self.recipe, step, self.inputs.architecture.parameters, self.world)
        self.engine.sync_parameters()
        with write_failures(self.folder):
            request = dist_checkpointing.save(
                self._sharded(is_loading=False), str(incomplete), self._strategy(), async_sharded_save=self._queue is not None
            )
        if self._queue is None:
            self._finish(incomplete, step)
        else:
            request.add_finalize_fn(lambda: self._finish(incomplete, step))
            self._queue.schedule_async_request(request)

    def poll(self) -> None:
        """Let a background save that is done move the pointer. Collective; call it once a step."""
        if self._queue is not None:
            with write_failures(self.folder):
                self._queue.maybe_finalize_async_calls(blocking=False)

    def wait(self) -> None:
        """Until every background save is done. Collective."""
        if self._queue is not None:
            with write_failures(self.folder):
                self._queue.maybe_finalize_async_calls(blocking=True)

    def load(self, path: Path) -> None:
        """Weights and optimizer states of a checkpoint, whatever layout wrote it. Collective. Raises UserError where it is damaged."""
        from megatron.core import dist_checkpointing
        from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: what any rank's reading raised

        # Collectives inside the load hang or cross if one rank alone fails before them: what every rank reads alone comes first.
        self.world.together(lambda: self._read_alone(path))

        def read():
            try:
                return dist_checkpointing.load(self._sharded(is_loading=True), str(path))
            except (dist_checkpointing.core.CheckpointingException, CheckpointException, KeyError, EOFError, RuntimeError) as error:
                lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
                raise UserError(
                    path, f"cannot be loaded ({lines[-1].strip()[:200]})", "write the name of an earlier one into checkpoints/latest"
                ) from None

        state = self.world.together(read)
        for number, chunk in enumerate(self.engine.chunks):
            unwrapped(chunk).load_state_dict(state[_chunk_key(number)], strict=True)
        self.engine.optimizer.load_state_dict(state["optimizer"])

    def _read_alone(self, path: Path) -> None:
        from megatron.core import dist_checkpointing

        try:
            dist_checkpointing.load_common_state_dict(str(path))
        except (OSError, UserError):
            raise
        except Exception as error:  # a damaged archive may raise nearly anything
            raise UserError(
                path, f"cannot be loaded ({type(error).__name__})", "write the name of an earlier one into checkpoints/latest"
            ) from None

    def _strategy(self):
        """Data-parallel ranks share the writing: by default their first writes all."""
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), replicas)

    def _finish(self, incomplete: Path, step: int) -> None:
        from endprompt.checkpoint.megatron_metadata import write_model_facts

        inputs, rank = self.inputs, self.world.rank
        if rank == 0:
            write_model_facts(incomplete, self.recipe, inputs.architecture, inputs.config, inputs.rope)
        mine = (path for path in incomplete.iterdir() if path.name.startswith(f"__{rank}_") or rank == 0)
        for path in mine:
            sync_path(path)
        finish_save(self.folder, self.recipe, incomplete, {"step": step, "data": inputs.data_fingerprint, "engine": ENGINE}, self.world)

    def _sharded(self, *, is_loading: bool) -> dict:
        """Model and optimizer as Megatron's sharded tensors.

        fully_reshardable: optimizer states in the shape of their parameters, so that any TP, PP and DP may load them
        (the default keeps the buffers of one layout).
        """
        from megatron.core import parallel_state

        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        }
        state = {
            _chunk_key(number): unwrapped(chunk).sharded_state_dict(metadata=metadata) for number, chunk in enumerate(self.engine.chunks)
        }
        optimizer = self.engine.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
        return {**state, "optimizer": optimizer}


def _chunk_key(number: int) -> str:
    return f"model{number}"
