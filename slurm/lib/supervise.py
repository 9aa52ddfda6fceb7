#!/usr/bin/env python3
"""Run a rank: hand signals on to it, give its exit code back, and record how it failed.

    supervise.py COMMAND...        RANK, SLURMD_NODENAME, FAILURES in the environment

With proctrack/cgroup SLURM signals what it has started itself, which is this process; with others every process of a step, so
that the rank may be told twice, which changes nothing. Not a shell: bash loses signals and exit codes that come together.
Imports little, for it is started once per GPU from a shared file system.
"""

import json
import os
import signal
import subprocess
import sys
import time

SIGNALS = {signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM}
SAVED_ON_REQUEST = 75  # endprompt.errors.EXIT_INTERRUPTED; as a failure it would make srun kill the ranks that are still closing


def main() -> int:
    code = run(sys.argv[1:])
    if code == SAVED_ON_REQUEST:
        return 0
    if code and os.environ.get("FAILURES"):
        record(code)
    return code


def run(command: list[str]) -> int:
    """The command's exit code, 128 + N where signal N ended it. Signals are waited for, one after another: none is lost."""
    awaited = {*SIGNALS, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    rank = subprocess.Popen(command, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited))
    while (code := rank.poll()) is None:
        number = signal.sigwait(awaited)
        if number in SIGNALS:
            rank.send_signal(number)
    return code if code >= 0 else 128 - code


def record(code: int) -> None:
    """One line in $FAILURES: the first rank that fails names the node to suspect, the others follow from it."""
    rank = int(os.environ["RANK"])
    temporary, file = (os.path.join(os.environ["FAILURES"], name) for name in (f".rank-{rank}.tmp", f"rank-{rank}.json"))
    with open(temporary, "w") as stream:
        json.dump({"time": time.time(), "node": os.environ["SLURMD_NODENAME"], "rank": rank, "exit_code": code}, stream)
    os.replace(temporary, file)


if __name__ == "__main__":
    sys.exit(main())
