"""Conversions in processes that a test may kill or measure. Importable by a fresh process, so it lies here."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

from endprompt.checkpoint import conversion, to_huggingface, to_megatron
from tests.support.forkserver import fork_context
from tests.support.sparse import drop_numbers

PLANS = {"to megatron": to_megatron.plan_to_megatron, "to huggingface": to_huggingface.plan_to_huggingface}


def convert(direction: str, source: Path, target: Path, *, resume: bool = False, workers: int = 2, **options) -> None:
    """As the commands do it, without their words."""
    if not conversion.check_target(target, resume):
        conversion.run(PLANS[direction](source, target, **options), workers=workers, resume=resume, quiet=True)


def start(direction: str, source: Path, target: Path, *, kill_at: str | None = None, delay: float = 0.0, **named):
    """Start `convert` in a process that has torch loaded already, journaling every few kilobytes.

    kill_at: "before rename" or "after rename": the process kills itself there. delay: seconds that every write sleeps.
    """
    process = fork_context().Process(target=_convert, args=(direction, source, target, kill_at, delay, named))
    process.start()
    return process


def _convert(direction: str, source: Path, target: Path, kill_at: str | None, delay: float, named: dict) -> None:
    conversion.SYNC_BYTES = 20_000
    write, rename = conversion.Files.write, os.rename

    def slow_write(self, *arguments):
        time.sleep(delay)
        write(self, *arguments)

    def fatal_rename(old, new):
        if kill_at == "before rename":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)
        os.kill(os.getpid(), signal.SIGKILL)

    conversion.Files.write = slow_write
    if kill_at:
        os.rename = fatal_rename
    convert(direction, source, target, **named)


def peak_memory(direction: str, source: Path, target: Path, **options) -> int:
    """Bytes of the largest resident set of a process of its own, imports included, that converts. drop: see `drop_numbers`."""
    context = fork_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(direction, source, target, options, theirs))
    process.start()
    theirs.close()
    try:
        peak = ours.recv()
    finally:
        process.join()
    assert process.exitcode == 0
    return peak


def _measure(direction: str, source: Path, target: Path, options: dict, pipe) -> None:
    if options.pop("drop", False):
        drop_numbers()
    convert(direction, source, target, **options)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
