"""Ranks say where they stand, and the odd one out comes first."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from endprompt.training.stacks import Standing, read_stacks, remove_empty, silent_ranks, summary
from tests.support.workspace import ROOT

RANK = """
import os, sys, threading, time
from endprompt.cluster.watchdog import watch
from endprompt.training import stacks
stacks.write_stacks_on_request()
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
if os.fork() == 0:  # a helper, in the rank's process group
    os.write(1, b"helper\\n")
    time.sleep(60)
def sleep(seconds):
    os.write(1, b"up\\n"), time.sleep(60)  # one line: the signal may come before the sleep
def wait_for_the_others(depth):
    if depth:
        wait_for_the_others(depth - 1)
    watch(stacks.Path("no such run"), 600.0, pause=sleep)
wait_for_the_others(int(sys.argv[1]))
"""


@pytest.fixture
def start():
    """start(rank, node, folder, depth of the stack): a process that listens, and its helper."""
    processes = []

    def start(rank: int = 0, node: str = "node01", folder: Path | None = None, depth: int = 0) -> subprocess.Popen:
        environment = {**os.environ, "RANK": str(rank), "SLURMD_NODENAME": node, **({"ENDPROMPT_STACKS": str(folder)} if folder else {})}
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(depth)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        assert {process.stdout.readline() for _ in range(2)} == {"helper\n", "up\n"}
        return process

    yield start
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def ask(folder: Path, *processes: subprocess.Popen, answers: int = 1) -> list[Standing]:
    """What they answer to SIGUSR2 to all of their processes, as SLURM sends it."""
    for process in processes:
        os.killpg(process.pid, signal.SIGUSR2)
    until = time.monotonic() + 30
    while sum(" in " in file.read_text() for file in folder.iterdir()) < answers and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(0.5)  # for the rest of it, and for a helper that should not write
    return read_stacks(folder)


def test_a_rank_says_where_it_stands_and_goes_on(start, tmp_path):
    process = start(3, "node07", tmp_path / "stacks")
    assert not (tmp_path / "stacks" / "rank-3-node07.txt").read_text()
    (found,) = ask(tmp_path / "stacks", process)
    assert process.poll() is None
    assert (found.rank, found.node) == (3, "node07")
    assert [frame.split()[0] for frame in found.frames] == ["sleep", "watch", "wait_for_the_others", "<module>"]
    assert found.place == f"{found.frames[0]}, called from {found.frames[1]}" and "(endprompt/cluster/watchdog.py:" in found.frames[1]
    text = (tmp_path / "stacks" / "rank-3-node07.txt").read_text()
    assert "in _bootstrap" in text and text.count("in wait_for_the_others") == 1, "its other thread too, not its helper"


def test_a_stack_too_deep_to_be_written_whole_is_still_the_main_threads(start, tmp_path):
    (found,) = ask(tmp_path, start(folder=tmp_path, depth=300))
    assert found.frames[1].startswith("watch ") and len(found.frames) >= 90


def test_the_rank_that_does_not_answer_comes_first(start, tmp_path):
    ranks = [start(rank, f"node0{rank}", tmp_path) for rank in range(3)]
    ranks[1].send_signal(signal.SIGSTOP)
    lines = summary(ask(tmp_path, *ranks, answers=2), 5)
    assert lines[0] == "node01: rank 1 does not answer"
    assert re.fullmatch(r"sleep \(<string>:\d+\), called from watch \(endprompt/cluster/watchdog.py:\d+\): ranks 0, 2", lines[1])
    assert lines[2:] == ["2 of 5 ranks left no file: they had not begun to listen"]


def test_without_a_folder_it_is_written_to_stderr(start):
    process = start()
    process.send_signal(signal.SIGUSR2)
    lines = iter(process.stderr.readline, "")
    assert any("in wait_for_the_others" in line for line in lines)


def standing(rank: int, *frames: str) -> Standing:
    return Standing(rank, f"node{rank // 8:02d}", frames)


def test_few_stand_before_many():
    reads, waits = "read (endprompt/data/samples.py:88)", "all_gather (torch/distributed/distributed_c10d.py:9)"
    step = "run (endprompt/zero3/loop.py:70)"
    nvtx = "wrapped_fn (deepspeed/utils/nvtx.py:33)"
    found = [standing(rank, reads) if rank == 63 else standing(rank, nvtx, waits, step) for rank in range(128)]
    assert summary(found, 128) == [f"{reads}: rank 63", f"{waits}, called from {step}: ranks 0-62, 64-127"]


def test_nobody_is_blamed_where_nobody_answers():
    assert silent_ranks([standing(0), standing(1)]) == [] and summary([standing(0), standing(1)], 2) == ["no rank answered"]
    assert [rank.rank for rank in silent_ranks([standing(0, "f (a.py:1)"), standing(1)])] == [1]


def test_only_what_somebody_wrote_is_kept(tmp_path):
    for attempt, texts in {"7-0": ("", ""), "7-1": ("", "Current thread"), "7-2": ()}.items():
        (tmp_path / attempt).mkdir()
        for rank, text in enumerate(texts):
            (tmp_path / attempt / f"rank-{rank}-node01.txt").write_text(text)
    remove_empty(tmp_path.iterdir())
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "7-1", "7-1/rank-0-node01.txt", "7-1/rank-1-node01.txt",
    ]  # fmt: skip


def test_on_a_gpu_the_backward_pass_is_what_the_main_thread_waits_for(tmp_path):
    """Autograd runs hooks and recomputation in a thread of its own there, which Python has not started."""
    dump = [
        ["torch/cuda.py 1 all_gather", "transformers/llama.py 2 forward"],
        ["signal.py 1 sigwait", "threading.py 2 _bootstrap"],
        ["torch/autograd/graph.py 3 _engine_run_backward", "endprompt/zero3/loop.py 4 optimizer_step", "ds_train.py 5 <module>"],
    ]
    words = [[line.split() for line in thread] for thread in dump]
    threads = ["".join(f'  File "{file}", line {line} in {function}\n' for file, line, function in thread) for thread in words]
    (tmp_path / "rank-0-node01.txt").write_text("\n".join(f"Thread 0x1 (most recent call first):\n{frames}" for frames in threads))
    assert summary(read_stacks(tmp_path), 1) == [
        "all_gather (torch/cuda.py:1), called from optimizer_step (endprompt/zero3/loop.py:4): rank 0"
    ]


def test_a_folder_that_cannot_be_written_ends_no_run():
    body = "from endprompt.training.stacks import write_stacks_on_request; write_stacks_on_request(); print('trains')"
    environment = {**os.environ, "ENDPROMPT_STACKS": "/proc/nowhere"}
    found = subprocess.run([sys.executable, "-c", body], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert found.stdout == "trains\n" and found.stderr.startswith("note: /proc/nowhere: ")
