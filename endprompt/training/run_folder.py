"""The folder of one run and the facts in it that outlive a process.

recipe.yaml      the recipe as resolved (overrides and environment applied)
log.jsonl        one line per logged step; a resumed run first drops lines beyond its checkpoint
status.json      state, step, starts, exit code, error: what a launcher reads
checkpoints/     step_00000200/ ..., and `latest`, which names the newest complete one
export/          the finished Hugging Face checkpoint
STOP             created by the user: save, stop, and stay stopped
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from endprompt.atomic import atomic_file, write_json
from endprompt.errors import UserError, from_os_error
from endprompt.recipe import Recipe
from endprompt.training.run_files import read_status

if TYPE_CHECKING:  # what a login node asks of a run folder shall not cost the import of torch
    from endprompt.training.world import World


class RunFolder:
    """Paths and small files of a run. Only rank 0 writes; every rank reads."""

    def __init__(self, recipe: Recipe):
        self.path = Path(recipe.output.directory)
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "export"
        self.log = self.path / "log.jsonl"
        self.stop_file = self.path / "STOP"
        self._status = self.path / "status.json"
        self._lock = None

    def check_writable(self) -> None:
        """Raise UserError or OSError unless files can be made here. Makes the folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_file(self.path / ".writable") as file:
            file.write("")
        (self.path / ".writable").unlink()

    def claim(self, patience: float = 0.0) -> None:
        """Refuse a second run in the same folder; the claim ends with this process, however it ends.

        patience: seconds to wait for the other one. A file server may hold the lock of a node that has died for minutes.
        """
        self._lock = open(self.path / ".lock", "a")  # noqa: SIM115  (held open as long as the process lives)
        until = time.monotonic() + patience
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    print(f"note: {self.path} is on a file system without locks; nothing keeps a second run out", flush=True)
                    return None
                if time.monotonic() > until:
                    raise UserError(self.path, "another run is using this folder", "wait for it or set output.directory") from None
                time.sleep(1)

    def check_shared(self, world: World) -> None:
        """Every rank sees what rank 0 writes here. Collective; raises UserError on a folder that is local to a node.

        A network file system may show a new file late: ranks look for ten seconds.
        """
        token = world.on_rank_0(self._write_token)
        world.together(lambda: self._await_token(token, world.rank))
        world.on_rank_0(lambda: (self.path / ".shared").unlink())

    def _write_token(self) -> str:
        token = os.urandom(8).hex()
        with atomic_file(self.path / ".shared") as file:
            file.write(token)
        return token

    def _await_token(self, token: str, rank: int) -> None:
        for _ in range(100):
            with contextlib.suppress(FileNotFoundError):
                if (self.path / ".shared").read_text() == token:
                    return
            time.sleep(0.1)
        raise UserError(self.path, f"rank {rank} does not see what rank 0 writes there", "set output.directory to a shared file system")

    def check_not_stopped(self) -> None:
        if self.stop_file.exists():
            raise UserError(self.stop_file, "this run was told to stop and stays stopped", "remove the file to go on")

    def read_status(self) -> dict:
        """The last status, {} for a new run. Raises UserError on a damaged one."""
        return read_status(self.path)

    def write_status(self, **facts) -> None:
        """Merge `facts` into status.json."""
        write_json(self._status, {**self.read_status(), **facts, "updated": time.strftime("%Y-%m-%dT%H:%M:%S%z")})

    @contextlib.contextmanager
    def failures_recorded(self) -> Iterator[None]:
        """Within the block an exception is written to status.json on its way out, as the exit code that it will become."""
        try:
            yield
        except BaseException as error:
            known = from_os_error(error) if isinstance(error, OSError) and error.errno is not None else error
            code = known.exit_code if isinstance(known, UserError) else 130 if isinstance(error, KeyboardInterrupt) else 1
            with contextlib.suppress(UserError, OSError):  # the disk may be what is full
                self.write_status(state="failed", exit_code=code, error=" ".join(f"{type(error).__name__}: {error}".split())[:500])
            raise

    def write_recipe(self, recipe: Recipe) -> None:
        with atomic_file(self.path / "recipe.yaml") as file:
            yaml.safe_dump(recipe.model_dump(mode="json"), file, sort_keys=False)

    def forget_steps_after(self, step: int) -> None:
        """Drop log lines of steps that no checkpoint holds, so that the log of a resumed run repeats none."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line torn by a kill is one of those to drop
                if json.loads(line)["step"] <= step:
                    kept.append(line)
        with atomic_file(self.log) as file:
            file.writelines(line + "\n" for line in kept)

    def append_log(self, entry: dict) -> None:
        """Add one line, with `time` (Unix seconds): only so can be told later what saves and restarts cost."""
        with open(self.log, "a") as file:
            file.write(json.dumps({**entry, "time": round(time.time(), 2)}) + "\n")

    def wandb_id(self) -> str:
        """One wandb run across restarts: made once, kept in the folder."""
        path = self.path / "wandb_id"
        if not path.exists():
            with atomic_file(path) as file:
                file.write(os.urandom(8).hex())
        return path.read_text().strip()
