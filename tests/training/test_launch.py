"""The local launcher hands over ranks' exit codes, signals and environment."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from endprompt.training.hardware import CPU_ALLOCATOR

LAUNCH = "import sys; from endprompt.training.launch import launch; sys.exit(launch(2, [sys.executable, '-c', sys.argv[1]]))"


def run(body: str, **options):
    return subprocess.run([sys.executable, "-c", LAUNCH, body], capture_output=True, text=True, timeout=60, **options)


def test_every_rank_gets_its_place():
    body = (
        "import os; words = [os.environ[k] for k in ('RANK','LOCAL_RANK','WORLD_SIZE','MASTER_ADDR')]; "
        "words.append(str(os.environ['MASTER_PORT'].isdigit())); os.write(1, (' '.join(words) + chr(10)).encode())"  # one write a rank
    )
    assert sorted(run(body).stdout.split("\n")[:2]) == ["0 0 2 127.0.0.1 True", "1 1 2 127.0.0.1 True"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks on GPUs are started as they are")
@pytest.mark.parametrize("given", [{}, dict.fromkeys(CPU_ALLOCATOR, "")])
def test_ranks_on_a_cpu_keep_memory_unless_told_otherwise(given):
    environment = {name: value for name, value in os.environ.items() if name not in CPU_ALLOCATOR}
    body = f"import json, os; os.write(1, (json.dumps([os.environ[name] for name in {list(CPU_ALLOCATOR)}]) + chr(10)).encode())"
    found = [json.loads(line) for line in run(body, env={**environment, **given}).stdout.splitlines()]
    assert found == [list((given or CPU_ALLOCATOR).values())] * 2


def test_memory_that_a_rank_frees_is_taken_again_without_the_kernel():
    """Twenty times 64 MB: plainly 16,384 faults each, 32 where pages of 2 MB come by themselves; kept, none after the first."""
    body = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def take():
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**26)))
    ctypes.memset(block, 1, 2**26)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
first = take()
for _ in range(19):
    last = take()
print(last - first)
"""
    faults = {}
    for name, environment in (("plain", {}), ("kept", CPU_ALLOCATOR)):
        clean = {key: value for key, value in os.environ.items() if key not in CPU_ALLOCATOR}
        found = subprocess.run([sys.executable, "-c", body], env={**clean, **environment}, capture_output=True, text=True, timeout=60)
        faults[name] = int(found.stdout)
    assert faults["plain"] > 19 * 30 and faults["kept"] < 19


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("", 0),
        ("import sys; sys.exit(2)", 2),
        ("import sys; sys.exit(75)", 75),
        ("import os, sys; sys.exit(2 if os.environ['RANK'] == '1' else 0)", 2),
        ("import os, sys; sys.exit(1 if os.environ['RANK'] == '1' else 75)", 1),
        ("import os; os.environ['RANK'] == '1' and os.kill(os.getpid(), 9)", 137),
    ],
)
def test_exit_code_of_the_ranks_comes_through(body, code):
    assert run(body).returncode == code


def test_a_dead_rank_takes_the_others_down(monkeypatch):
    quick = LAUNCH.replace("sys.exit(launch", "import endprompt.training.launch as m; m.GRACE_SECONDS = 0.5; sys.exit(launch")
    body = "import os, time, sys; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(60)"
    started = time.monotonic()
    assert subprocess.run([sys.executable, "-c", quick, body], timeout=60).returncode == 3
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_signals_reach_every_rank(number, tmp_path):
    body = (
        "import signal, sys, time, os, pathlib\n"
        f"signal.signal({int(number)}, lambda *_: sys.exit(75))\n"
        f"pathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, body])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.wait(timeout=30) == 75


def test_a_rank_that_does_not_listen_yet_survives_sigusr2(tmp_path):
    body = f"import os, signal, time, pathlib\npathlib.Path({str(tmp_path)!r}, os.environ['RANK']).touch()\ntime.sleep(2)"
    process = subprocess.Popen([sys.executable, "-c", LAUNCH, body])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR2)
    assert process.wait(timeout=30) == 0
