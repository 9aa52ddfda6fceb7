"""Signals ask for a stop, from the first moment and whatever else they reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support.workspace import ROOT

ASKED = """
import signal, subprocess, sys, time
from pathlib import Path
if {ignored}:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as slurm/lib/rank.sh leaves it
from endprompt.training.stopping import StopRequests
stop = StopRequests(Path("no such file"))
helper = subprocess.Popen([sys.executable, "-c", "import sys; print('up', flush=True); print(sys.stdin.readline().strip())"],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
helper.stdout.readline()
print("ready", flush=True)
until = time.monotonic() + 20
while stop.reason is None and time.monotonic() < until:
    time.sleep(0.01)
try:
    output, _ = helper.communicate("alive\\n")
except BrokenPipeError:
    output = ""
print(stop.reason, output.strip(), helper.returncode, flush=True)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_usr1_to_a_whole_process_group_stops_the_rank_and_spares_its_helpers(ignored):
    process = _start(ignored)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.communicate(timeout=30)[0].split() == ["SIGUSR1", "alive", "0"]


def test_term_still_ends_helpers():
    process = _start(False)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.communicate(timeout=30)[0].split() == ["SIGTERM", "-15"]


def _start(ignored: bool) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", ASKED.format(ignored=ignored)], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.05)
    return process
