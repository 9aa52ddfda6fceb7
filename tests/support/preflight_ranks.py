"""Ranks of many preflights at once, at the cost of one import of torch.

python -m tests.support.preflight_ranks SCENARIOS.json      prints {"name": [{"code", "seconds", "stderr"}, ...], ...}

A scenario is {"name": {"ranks": [{"rank", "node", "records", "gpus", "fault"}, ...], "size", "seconds", "kill_on_bad_exit"}}.
Every rank is a fork of this process, which has imported everything and initialised nothing, and runs the command's own main.
A fault is planted in that one process.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from endprompt.cluster.preflight import bandwidth, machine, meeting, rank
from endprompt.errors import run_command
from tools import preflight

real_all_reduce, real_measure = dist.all_reduce, bandwidth.measure


def wrong_sum() -> None:
    def all_reduce(tensor, *arguments, **named):
        real_all_reduce(tensor, *arguments, **named)
        if tensor.numel() > 1:
            tensor[len(tensor) // 2] += 1

    dist.all_reduce = all_reduce


def killed() -> None:
    bandwidth.measure = lambda *arguments, **named: os.kill(os.getpid(), signal.SIGKILL)


def hangs() -> None:
    bandwidth.measure = lambda *arguments, **named: time.sleep(600)


def lingers() -> None:
    """Rank 0 is slow to go once it has told the others."""
    real_wait = meeting._wait_for_count
    meeting._wait_for_count = lambda store, key, *rest: time.sleep(20) if key == "heard" else real_wait(store, key, *rest)


def gpus(count: int):
    def plant() -> None:
        machine.gpus = lambda: {"count": count, "names": ["NVIDIA H100"] * count, "driver": "535.1", "uncorrected_ecc": [0] * count}

    return plant


FAULTS = {"wrong_sum": wrong_sum, "killed": killed, "hangs": hangs, "lingers": lingers, "one_gpu": gpus(1), "no_gpu": gpus(0)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(scenario: dict, spec: dict, port: int, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(
        RANK=str(spec["rank"]), LOCAL_RANK="0", WORLD_SIZE=str(scenario["size"]), LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), SLURMD_NODENAME=spec["node"],
    )  # fmt: skip
    rank.HEAD_SECONDS, meeting.LINGER_SECONDS = 0.5, 1.0
    if spec.get("fault"):
        FAULTS[spec["fault"]]()
    sys.argv = [
        "preflight.py", "rank", "--records", spec["records"], "--gpus", str(spec.get("gpus", 0)), "--all-reduce-mb", "1",
        "--timeout-seconds", str(scenario["seconds"]),
    ]  # fmt: skip
    try:
        run_command(preflight.main)
    except SystemExit as stopped:
        os._exit(stopped.code)


def main() -> None:
    scenarios, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[1]).parent
    torch.set_num_threads(1)
    began, running, results = time.monotonic(), {}, {}
    for name, scenario in scenarios.items():
        port = free_port()
        results[name] = [None] * len(scenario["ranks"])
        for number, spec in enumerate(scenario["ranks"]):
            log = folder / f"{name}-{number}.stderr"
            running[start(scenario, spec, port, log)] = (name, number, log)
    while running:
        child, status = os.wait()
        name, number, log = running.pop(child)
        code = os.waitstatus_to_exitcode(status)
        if code and scenarios[name].get("kill_on_bad_exit"):  # as srun does with that option
            for peer, (of, *_) in running.items():
                if of == name:
                    os.kill(peer, signal.SIGTERM)
        results[name][number] = {"code": code, "seconds": time.monotonic() - began, "stderr": log.read_text()}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
