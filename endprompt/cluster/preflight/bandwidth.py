"""How fast an all-reduce goes, and whether its sums are right.

Algorithm bandwidth is size / time. Bus bandwidth is that x 2(n-1)/n, nccl-tests' convention: what a ring moves through every
rank's link, comparable between numbers of ranks. All rates are in 10^9 bytes/s.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from endprompt.planning.cluster import LINK_EFFICIENCY, Cluster

WARM_UP, TIMED = 2, 5
"""The first all-reduce opens connections (seconds on many nodes), the second fills caches; the median of five bears two outliers."""


@dataclass(frozen=True)
class Measurement:
    """seconds: of each timed all-reduce of `size` bytes over `ranks`. wrong: what this rank found instead of the right sum, if it did."""

    ranks: int
    size: int
    seconds: list[float]
    wrong: str | None

    @property
    def algorithm(self) -> float:
        return self.size / statistics.median(self.seconds) / 1e9

    @property
    def bus(self) -> float:
        return self.algorithm * 2 * (self.ranks - 1) / self.ranks

    def as_record(self, line_rate: float | None) -> dict[str, Any]:
        """line_rate: what the links could carry, in 10^9 bytes/s, None where nothing is assumed about them (gloo)."""
        return {
            "ranks": self.ranks,
            "bytes": self.size,
            "median_seconds": statistics.median(self.seconds),
            "algorithm_gb_per_s": self.algorithm,
            "bus_gb_per_s": self.bus,
            "line_rate_gb_per_s": line_rate,
        }


def measure_among(ranks: list[int], limit: timedelta, device: torch.device, megabytes: float) -> Measurement:
    """Time all-reduces over these ranks only. Collective over them; ranks that are not among them go on meanwhile.

    The group is destroyed at once: torch puts the number of groups that a rank is in into the name of the next one, so two ranks
    that have been in different numbers of groups would wait for each other for ever. And NCCL gets its buffers back.
    """
    group = dist.new_group(ranks, timeout=limit, use_local_synchronization=True)
    try:
        return measure(device, megabytes, contributions=ranks, group=group)
    finally:
        dist.destroy_process_group(group)


def measure(device: torch.device, megabytes: float, *, contributions: list[int], group: Any = None) -> Measurement:
    """Time all-reduces of fp32 over a group. Collective over it. contributions: the ranks of the group, each of which adds rank + 1.

    Sums of fp32 are exact up to 2^24, that is, over 5,792 ranks.
    """
    rank = dist.get_rank()
    buffer = torch.empty(max(1, round(megabytes * 1e6 / 4)), dtype=torch.float32, device=device)
    right = float(sum(number + 1 for number in contributions))
    seconds, wrong = [], None
    for _ in range(WARM_UP + TIMED):
        buffer.fill_(rank + 1)
        barrier(device, group)  # a rank that comes later would find the others' waiting in its own time
        began = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        smallest, largest = buffer.min().item(), buffer.max().item()
        if not smallest == largest == right:  # `not ==`: NaN is wrong too
            wrong = wrong or f"{smallest:g} to {largest:g} instead of {right:g}"  # no raise: the others are in the next collective
    return Measurement(len(contributions), buffer.numel() * 4, seconds[WARM_UP:], wrong)


def barrier(device: torch.device, group: Any = None) -> None:
    """Until every rank of the group is here, to within one small message (some microseconds on NCCL, a millisecond on gloo)."""
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    synchronize(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def line_rate(device: torch.device, nodes: int, ranks_per_node: int) -> float | None:
    """What the planner's links carry for a ring over all ranks, without its allowance for efficiency; None on CPUs."""
    if device.type != "cuda":
        return None
    return Cluster(nodes, ranks_per_node).bus_rate(nodes * ranks_per_node, ranks_per_node) / LINK_EFFICIENCY / 1e9
