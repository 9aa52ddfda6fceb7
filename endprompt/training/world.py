"""This process's place among the ranks of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from endprompt.errors import UserError, from_os_error


@dataclass(frozen=True)
class World:
    """Rank, number of ranks and device; made once torch.distributed is initialised."""

    rank: int
    size: int
    device: torch.device

    @classmethod
    def current(cls) -> World:
        """From torch.distributed and LOCAL_RANK: one GPU per process where there are GPUs, else the CPU."""
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def print(self, *words: object) -> None:
        if self.rank == 0:
            print(*words, flush=True)

    @contextmanager
    def left_at_the_end(self) -> Iterator[None]:
        """Leave the process group after the block, or when a UserError, which all ranks share, ends it.

        A gloo thread that still lets go of its last operation needs Python's lock, which is gone once the interpreter
        finalises: `terminate called without an active exception`, exit code 134, measured in 4 of 25 exits, and a finished
        run would look like a crash. Leaving ends the threads, except where DeepSpeed keeps the group in every parameter
        (8 of 25); hence the short wait (none of 40). After any other error nothing is waited for: the other ranks may be
        in a collective.
        """
        try:
            yield
        except UserError:
            self._leave()
            raise
        self._leave()

    def _leave(self) -> None:
        dist.destroy_process_group()
        if self.device.type == "cpu":
            time.sleep(0.2)

    def on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 and give its result to every rank; so too a UserError or OSError, lest the others wait for ever."""
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = action()
            except (UserError, OSError) as problem:
                outcome[1] = problem if isinstance(problem, UserError) else from_os_error(problem)
        dist.broadcast_object_list(outcome, src=0, device=self.device)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank; if it fails with bad input on any, raise that on all."""
        result, error = None, None
        try:
            result = action()
        except (UserError, OSError) as problem:
            error = problem if isinstance(problem, UserError) else from_os_error(problem)
        errors: list[Any] = [None] * self.size
        dist.all_gather_object(errors, error)
        first = next((found for found in errors if found is not None), None)
        if first is not None:
            raise first
        return result
