"""Watching and ending a training process of `Workspace.start`."""

import contextlib
import os
import random
import signal
import time

from endprompt.training.stacks import read_stacks
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


def assert_ranks_say_where_they_stand(process, folder, ranks: int) -> None:
    """Asked by SIGUSR2 to the launcher, each of a run that was started with ENDPROMPT_STACKS=folder writes its stack and goes on."""
    os.kill(process.pid, signal.SIGUSR2)
    wait_for(lambda: sum(bool(standing.frames) for standing in read_stacks(folder)) == ranks, process, seconds=60)
    assert all("endprompt/" in standing.place or "megatron_patches/" in standing.place for standing in read_stacks(folder))


def logged_steps(run) -> int:
    return len(losses(run)) if (run / "log.jsonl").exists() else 0


def kill_during_saves(start, checkpoints, written: str, *, kills: int) -> None:
    """Start a run that saves after every step again and again, killing each start at a random moment of its first save.

    written: what lies in the folder `checkpoints`, as a pattern, once a save has begun. The moment lies between then and twice the
    time that a save took last, so that a fast machine and a slow one are killed before the pointer has moved as often as after.
    """
    moments, length, moved = random.Random(11), 0.3, 0

    def pointer() -> str:
        return (checkpoints / "latest").read_text().strip() if (checkpoints / "latest").exists() else ""

    def saving_since(moment: float) -> bool:
        with contextlib.suppress(FileNotFoundError):  # a folder renamed while it was listed, or a file before it was looked at
            return any(path.stat().st_mtime > moment for path in checkpoints.glob(written))
        return False

    for _ in range(kills):
        before, started, took = pointer(), time.time(), None
        process = start()
        wait_for(lambda since=started: saving_since(since), process)
        began, end = time.monotonic(), moments.uniform(0, 2 * length)
        while time.monotonic() < began + end:
            if took is None and pointer() > before:
                took = time.monotonic() - began
            time.sleep(0.002)
        kill(process)
        assert pointer() >= before, "the pointer never goes back"
        if pointer():
            assert (checkpoints / pointer() / "state.json").exists(), "the pointer names a whole checkpoint"
        moved += pointer() > before
        length = took or 1.3 * length
    assert 0 < moved < kills, "some kills must come before the pointer moves and some after"
