"""slurm/lib/rank.sh and supervise.py hand signals on to the rank, whomever SLURM signals, and its exit code back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from endprompt.training.stacks import read_stacks
from tests.support.workspace import ROOT

RANK = """
import os, sys, time
from pathlib import Path
print(os.getpid(), flush=True)
while not Path(sys.argv[2]).exists():
    time.sleep(0.01)
from endprompt.training.stacks import write_stacks_on_request
from endprompt.training.stopping import StopRequests
write_stacks_on_request()
stop = StopRequests(Path("no such file"))
os.write(1, b"listening\\n")
until = time.monotonic() + 60
while stop.reason is None and time.monotonic() < until:
    time.sleep(0.01)
print(stop.reason, flush=True)
sys.exit(int(sys.argv[1]))
"""


class Task:
    """The script as srun starts it. pid: of supervise.py, which it becomes; rank: of the process that this started."""

    def __init__(self, folder, code: int):
        self.folder = folder
        environment = {
            **os.environ, "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "PROCESSES_PER_NODE": "2",
            "SLURMD_NODENAME": "node02", "FAILURES": str(folder), "ENDPROMPT_STACKS": str(folder / "stacks"),
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["bash", "slurm/lib/rank.sh", sys.executable, "-c", RANK, str(code), str(folder / "go")],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.pid, self.rank = self.process.pid, int(self.process.stdout.readline())

    def listen(self) -> None:
        (self.folder / "go").touch()
        assert self.process.stdout.readline() == "listening\n"

    def end(self) -> tuple[str, int]:
        """(why the rank stopped, the script's exit code)"""
        return self.process.communicate(timeout=60)[0].strip(), self.process.returncode


@pytest.fixture
def start(tmp_path):
    tasks = []

    def start(code: int = 75) -> Task:
        tasks.append(Task(tmp_path, code))
        return tasks[-1]

    yield start
    for task in tasks:
        try:
            os.killpg(task.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        task.process.communicate()


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the one process", "every process"])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_save_reaches_the_rank(start, tmp_path, send, number):
    task = start()
    task.listen()
    send(task.pid, number)
    assert task.end() == (number.name, 0) and not list(tmp_path.glob("rank-*"))


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["the one process", "every process"])
def test_a_rank_that_imports_survives_and_one_that_listens_says_where_it_stands(start, tmp_path, send):
    task = start()
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        send(task.pid, number)
    task.listen()
    until = time.monotonic() + 30
    while time.monotonic() < until and not any(standing.frames for standing in read_stacks(tmp_path / "stacks")):
        send(task.pid, signal.SIGUSR2)
        time.sleep(0.1)
    (standing,) = read_stacks(tmp_path / "stacks")
    assert (standing.rank, standing.node) == (3, "node02") and standing.frames[-1].startswith("<module> (<string>:")
    send(task.pid, signal.SIGUSR1)
    assert task.end() == ("SIGUSR1", 0)


def test_no_signal_and_no_exit_code_is_lost_in_a_storm(start, tmp_path):
    """Where signals come together, and where they come while the rank ends."""
    task = start(code=3)
    task.listen()
    os.kill(task.pid, signal.SIGUSR1)
    while task.process.poll() is None:
        os.kill(task.pid, signal.SIGUSR2)
        time.sleep(0.0005)
    assert task.end() == ("SIGUSR1", 3)
    assert json.loads((tmp_path / "rank-3.json").read_text())["exit_code"] == 3


def test_a_rank_that_is_killed_leaves_its_node(start, tmp_path):
    task = start()
    os.kill(task.rank, signal.SIGKILL)
    assert task.end() == ("", 137)
    facts = json.loads((tmp_path / "rank-3.json").read_text())
    assert facts["time"] == pytest.approx(time.time(), abs=60)
    assert facts | {"time": 0} == {"time": 0, "node": "node02", "rank": 3, "exit_code": 137}
