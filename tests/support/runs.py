"""Watching and ending a training process of `Workspace.start`."""

import os
import signal
import time

from tests.support.workspace import losses


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def kill(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def logged_steps(run) -> int:
    return len(losses(run)) if (run / "log.jsonl").exists() else 0
