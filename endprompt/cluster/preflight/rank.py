"""The preflight's second part, one process a rank: what its node has, who is there, and how fast they talk."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # before torch: pages of C++ frames for a peer that is late
os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # else torch aborts a rank whose peer is gone before it has left its record

import torch
import torch.distributed as dist

from endprompt.atomic import write_json
from endprompt.cluster.preflight import bandwidth, machine, records
from endprompt.cluster.preflight.meeting import Meeting, meet
from endprompt.cluster.preflight.pairs import measure_pairs
from endprompt.cluster.preflight.place import Deadline, Place, RankFailure, end_process, write_errors
from endprompt.errors import EXIT_BAD_INPUT, UserError, from_os_error

HEAD_SECONDS = 10.0
"""How long a network file system may take to show what the batch host wrote."""

MEGABYTES = {"nccl": 1000.0, "gloo": 8.0}
"""Of one all-reduce. 1 GB at 300 GB/s of bus bandwidth takes 6 ms, where latency (about 10 us a hop) no longer counts."""


@dataclass(frozen=True)
class Settings:
    """gpus: that every node must have, 0 for a run on CPUs, None for what torch sees. seconds: that any phase may take."""

    directory: Path
    gpus: int | None = None
    megabytes: float | None = None
    minimum: float | None = None
    seconds: float = 120.0


def run(settings: Settings) -> int:
    """Do all of it; record and print what stops this rank. Returns the exit code; raises UserError for a bad environment."""
    place = Place.from_environment(os.environ)
    deadline = Deadline(place, settings.directory, settings.seconds)
    try:
        return _run(settings, place, deadline)
    except (RankFailure, OSError) as problem:
        failure = problem if isinstance(problem, RankFailure) else _own(place, from_os_error(problem))
        # 64 ranks need not all say what rank 0 told them.
        end_process(failure, settings.directory, say=failure.cause != "elsewhere" or place.rank == 0)


def _run(settings: Settings, place: Place, deadline: Deadline) -> int:
    on_gpu = torch.cuda.is_available() if settings.gpus is None else settings.gpus > 0
    backend = "nccl" if on_gpu else "gloo"
    with deadline.phase("looking at the machine", "look at the node's file systems and GPUs, or exclude it"):
        facts, problem = look(settings, place, on_gpu)
    # The meeting bounds itself by 2 x seconds and says who is missing.
    meeting = meet(place, backend, problem, settings.seconds, keep=lambda failure: write_errors(settings.directory, failure))
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    fix = "look for a rank that was killed or a network interface that is down (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
    try:
        with deadline.phase(f"the all-reduces over {place.size} ranks ({backend})", fix):
            wrong = talk(settings, place, meeting, device, facts)
    except RuntimeError as error:  # torch's, NCCL's and gloo's own errors are all of it
        reason = (str(error).splitlines() or [""])[0][:200]
        raise RankFailure(place, f"the all-reduces failed ({type(error).__name__}: {reason})", fix, "unknown") from None
    if wrong:
        fix = "exclude the node and have its GPUs and network cards tested"
        raise RankFailure(place, f"all-reduce gave a wrong sum: {wrong}", fix, "own")
    if place.rank == 0:
        return report(settings)
    return 0


def look(settings: Settings, place: Place, on_gpu: bool) -> tuple[dict[str, Any], RankFailure | None]:
    """The node's facts, written by its first rank, and what keeps this rank from going on."""
    head, problem = read_head(settings, place)
    facts = {
        "node": place.node,
        "hostname": socket.gethostname(),
        "ranks": [place.rank - place.local_rank + i for i in range(place.local_size)],  # srun's block order; the meeting knows
        "token": head["token"] if head else None,
        "gpus": None,
        "clock": time.time(),
    }
    if on_gpu:
        try:
            facts["gpus"] = machine.gpus() if place.local_rank == 0 else {"count": torch.cuda.device_count()}
        except UserError as error:
            problem = problem or _own(place, error)
        except RuntimeError as error:
            reason = (str(error).splitlines() or [""])[0][:200]
            problem = problem or RankFailure(place, f"CUDA does not start ({reason})", "exclude the node, have its GPUs looked at", "own")
        needed = max(settings.gpus or 0, place.local_rank + 1)
        if facts["gpus"] and facts["gpus"]["count"] < needed:
            words = f"has {facts['gpus']['count']} GPUs that torch can use, {needed} are needed"
            problem = problem or RankFailure(place, words, "exclude the node, or ask for fewer GPUs a node", "own")
    if place.local_rank == 0:
        facts["versions"] = machine.versions()
        run_folder = Path(head["run_folder"]) if head else None
        facts["free_gb"] = machine.free_gb(run_folder)
        if settings.directory.is_dir():
            write_json(records.node_path(settings.directory, place.node), facts)
    return facts, problem


def _own(place: Place, error: UserError) -> RankFailure:
    return RankFailure(place, f"{error.where}: {error.problem}", error.fix, "own")


def read_head(settings: Settings, place: Place) -> tuple[dict[str, Any] | None, RankFailure | None]:
    path, deadline = settings.directory / records.HEAD, time.monotonic() + HEAD_SECONDS
    while True:
        try:
            return records.read_record(path), None
        except (OSError, UserError) as error:
            if time.monotonic() < deadline:
                time.sleep(0.1)
                continue
            reason = (from_os_error(error) if isinstance(error, OSError) else error).problem
            fix = "put --records and the run folder on a file system that all nodes share, or exclude the node if it should see it"
            return None, RankFailure(place, f"does not see {path}, which the batch host wrote ({reason})", fix, "own")


def talk(settings: Settings, place: Place, meeting: Meeting, device: torch.device, facts: dict[str, Any]) -> str | None:
    """Process group, clocks, all-reduces over all ranks, within each node and of neighbours; records them.

    Returns what was wrong with a sum, if anything was.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.PrefixStore("preflight", meeting.store)
    # Longer than our own deadline: at its timeout NCCL's watchdog would abort this process before it has said anything.
    limit = timedelta(seconds=2 * settings.seconds + 60)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=limit)
    bandwidth.barrier(device)  # opens the connections
    bandwidth.barrier(device)
    facts["clock_at_meeting"] = time.time()  # all ranks read it within a millisecond or so

    megabytes = MEGABYTES[backend] if settings.megabytes is None else settings.megabytes
    whole = bandwidth.measure(device, megabytes, contributions=list(range(place.size)))
    facts["ranks"] = mine = meeting.ranks_of(place.node)
    within = bandwidth.measure_among(mine, limit, device, megabytes) if len(mine) > 1 else None
    pairs = measure_pairs(place, meeting, device, megabytes, limit)
    facts["all_reduce_within"] = within.as_record(bandwidth.line_rate(device, 1, len(mine))) if within else None
    rate = bandwidth.line_rate(device, 2, len(mine))
    facts["all_reduce_with"] = {node: pair.as_record(rate) for node, pair in pairs.items()}
    if place.local_rank == 0:
        write_json(records.node_path(settings.directory, place.node), facts)
    if place.rank == 0:
        rate = bandwidth.line_rate(device, len(set(meeting.nodes)), len(mine))
        record = {**whole.as_record(rate), "world_size": place.size, "backend": backend, "minimum_gb_per_s": settings.minimum}
        write_json(settings.directory / records.ALL_REDUCE, record)
    bandwidth.barrier(device)
    dist.destroy_process_group()
    meeting.leave(place)
    return next((found.wrong for found in (whole, within, *pairs.values()) if found and found.wrong), None)


def report(settings: Settings) -> int:
    """Rank 0's line. The record is left for `judge`, which holds it against the minimum too and names slow nodes."""
    record = records.read_record(settings.directory / records.ALL_REDUCE)
    print(records.describe_all_reduce(record), flush=True)
    if settings.minimum is not None and record["ranks"] > 1 and record["bus_gb_per_s"] < settings.minimum:
        return EXIT_BAD_INPUT
    return 0
