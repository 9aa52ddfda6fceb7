"""Where a rank stands, what stops it, and the clock that ends it when a library neither returns nor raises."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from endprompt.atomic import write_json
from endprompt.cluster.preflight.records import error_path
from endprompt.errors import EXIT_BAD_INPUT, UserError, from_os_error

Cause = Literal["own", "unknown", "elsewhere"]
"""Whose fault a failure is: this node's own; a collective's, where any rank may have been the one; another rank's."""

WRITE_SECONDS = 5.0
"""How long a process that ends itself waits for its record to reach the disk: the file system may be what hangs."""


@dataclass(frozen=True)
class Place:
    """One rank, from the environment that srun (or a launcher) sets. node: SLURMD_NODENAME."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    node: str
    address: str
    port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Place:
        """Raises UserError for what is not set or no number."""

        def word(name: str) -> str:
            if not environment.get(name):
                raise UserError(name, "is not set", "start `preflight.py rank` with srun from a script of slurm/, or set it")
            return environment[name]

        def number(name: str) -> int:
            if not word(name).isdigit():
                raise UserError(name, f"is {word(name)!r}, not a whole number", "correct it")
            return int(word(name))

        return cls(
            number("RANK"), number("LOCAL_RANK"), number("WORLD_SIZE"), number("LOCAL_WORLD_SIZE"), word("SLURMD_NODENAME"),
            word("MASTER_ADDR"), number("MASTER_PORT"),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.node}: rank {self.rank}"


class RankFailure(UserError):
    """What stops a rank. Of rank 0 also: ranks that are `missing`, and `told`, the records of ranks that arrived with a problem."""

    def __init__(self, place: Place, problem: str, fix: str, cause: Cause):
        super().__init__(place, problem, fix)
        self.rank, self.node, self.cause = place.rank, place.node, cause
        self.missing: list[int] = []
        self.told: list[dict] = []

    def as_record(self) -> dict:
        return {
            "rank": self.rank, "node": self.node, "error": str(self), "problem": self.problem, "fix": self.fix, "cause": self.cause,
            "missing_ranks": self.missing,
        }  # fmt: skip


class Deadline:
    """Ends this process, with its record and one line, when a phase takes longer than `seconds`.

    A collective of NCCL whose peer is gone neither raises nor returns, a file system that is gone blocks any call, and torch's
    own watchdog aborts without a record. So no phase is left to its library's own timeout.
    """

    def __init__(self, place: Place, directory: Path, seconds: float):
        self._place, self._directory, self._seconds = place, directory, seconds

    @contextmanager
    def phase(self, what: str, fix: str) -> Iterator[None]:
        failure = RankFailure(self._place, f"{what} did not end within {self._seconds:g} s", fix, "unknown")
        timer = threading.Timer(self._seconds, end_process, [failure, self._directory])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


_ENDING = threading.Lock()


def end_process(failure: RankFailure, directory: Path, *, say: bool = True) -> NoReturn:
    """Print the failure's line, leave its records and exit with 2 at once.

    At once, because a process group may hold threads that wait for a peer for ever. The first thread that comes here does it: when
    one rank's deadline ends it, the others see it go at the very moment of their own.
    """
    if not _ENDING.acquire(blocking=False):
        threading.Event().wait()  # until the other thread ends the process
    if say:
        print(f"error: {failure}", file=sys.stderr, flush=True)
    writer = threading.Thread(target=write_errors, args=(directory, failure), daemon=True)
    writer.start()
    writer.join(WRITE_SECONDS)
    sys.stdout.flush()
    os._exit(EXIT_BAD_INPUT)


def write_errors(directory: Path, failure: RankFailure) -> None:
    """rank-R.error.json of this rank and of those it was told of: they may not see the folder.

    Only where this machine sees it: a private copy on its own disk would help nobody.
    """
    if not directory.is_dir():
        return
    for error in (*failure.told, failure.as_record()):
        try:
            write_json(error_path(directory, error["rank"]), error)
        except OSError as problem:
            print(f"error: {from_os_error(problem)}", file=sys.stderr, flush=True)
