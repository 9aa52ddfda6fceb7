"""Start one process per device on this machine and give back one exit code.

torchrun reports every non-zero exit as 1 with a traceback of its own; here the ranks' own code comes through, so that
bad input (2) and a saved interruption (75) look the same with one rank and with many. On several nodes use torchrun; the
run folder's status.json then says what happened.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from endprompt.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED

GRACE_SECONDS = 20.0
"""How long the other ranks may go on after one has failed (they may be about to report the same bad input)."""


def under_launcher() -> bool:
    """True where torchrun or this module has already set this process's rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def become_single_process() -> None:
    """Give a plain `python script.py` the environment of a world of one."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))


def launch(processes: int, command: list[str] | None = None) -> int:
    """Run `command` (this same command line by default) once per rank; signals are passed on. Returns the exit code.

    Ranks on a CPU get an allocator that keeps memory (hardware.CPU_ALLOCATOR), unless the environment says something else.
    """
    from endprompt.training.hardware import rank_environment  # imports torch

    command = command or [sys.executable, *sys.argv]
    port = str(_free_port())
    environment = {**rank_environment(), **os.environ}
    environment.update(WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    ranks: list[subprocess.Popen] = []

    def pass_on(number: int, frame) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # as ranks inherit it until they listen (stacks.py)
    try:
        for rank in range(processes):
            ranks.append(subprocess.Popen(command, env=dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))))
        signal.signal(signal.SIGUSR2, pass_on)
        return _wait(ranks)
    finally:
        _end(ranks)


def _wait(ranks: list[subprocess.Popen]) -> int:
    failed_at = None
    while any(rank.poll() is None for rank in ranks):
        if failed_at is None and any(rank.poll() not in (None, 0, EXIT_INTERRUPTED) for rank in ranks):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > GRACE_SECONDS:
            _end(ranks)
        time.sleep(0.1)
    return exit_code([rank.returncode for rank in ranks])


def exit_code(codes: list[int]) -> int:
    """One code for all ranks: bad input wins, then the first crash, then a saved interruption.

    Ranks that are ended because another one failed carry -SIGTERM or -SIGKILL, so a positive code is the cause.
    """
    crashes = [code for code in codes if code not in (0, EXIT_BAD_INPUT, EXIT_INTERRUPTED)]
    if EXIT_BAD_INPUT in codes:
        return EXIT_BAD_INPUT
    if crashes:
        cause = next((code for code in crashes if code > 0), crashes[0])
        return cause if cause > 0 else 128 - cause
    return EXIT_INTERRUPTED if EXIT_INTERRUPTED in codes else 0


def _end(ranks: list[subprocess.Popen]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
    for rank in ranks:
        rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
