"""Bandwidth, held against a minimum: over all ranks; within each node and between neighbours to find the slow one.

All rates are bus bandwidth in 10^9 bytes/s.

Without --min-bandwidth-gbps the minimum over NCCL is a quarter of what the planner's links could carry (`planning/cluster.py`):
NVLink's 450 within a node; across nodes one 400 Gb/s card (50) for each of its ranks, 400 with eight, so 100. A sound cluster
reaches 70 to 90 % of it. A quarter lets nodes with four cards pass (200, of which about 160 arrive) and stops what makes a run
hopeless: TCP over 100 Gb/s Ethernet (at most 12), one card of eight in use (50), PCIe in place of NVLink (about 25).
Over gloo anything above 0 passes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from endprompt.cluster.preflight.findings import EXCLUDE, Finding
from endprompt.errors import UserError

SHARE = 0.25
SLOW = 0.5
"""A node that is below this share of the median node (three nodes or more, NCCL) is slow even where it passes the minimum."""


def least(asked: float | None, record: dict[str, Any]) -> float:
    """The minimum that a measurement is held against."""
    if asked is not None:
        return asked
    rate = record["line_rate_gb_per_s"]
    return SHARE * rate if rate is not None else 0.0


def too_slow(rate: float, minimum: float) -> bool:
    return not (rate > 0 and rate >= minimum)  # `not`: NaN is too slow


def check_all_reduce(asked: float | None, record: dict[str, Any]) -> Iterable[Finding]:
    """asked: judge's --min-bandwidth-gbps; where it is left out the one that the ranks were given counts."""
    if record["ranks"] == 1:
        return
    minimum = least(record["minimum_gb_per_s"] if asked is None else asked, record)
    if too_slow(record["bus_gb_per_s"], minimum):
        words = f"{record['bus_gb_per_s']:.3g} GB/s bus ({record['backend']}), at least {minimum:.3g} are needed"
        fix = "see with NCCL_DEBUG=INFO that NCCL uses NET/IB on every card and NVLink, or lower --min-bandwidth-gbps if the links are such"
        yield Finding(None, UserError(f"all-reduce over {record['ranks']} ranks", words, fix))


def check_pairs(asked: float | None, found: dict[str, dict[str, Any]], all_reduce: dict[str, Any] | None) -> Iterable[Finding]:
    """A node that is too slow with both its neighbours, where most nodes are not: with one of them it may be the other's fault."""
    if asked is None and all_reduce is not None:
        asked = all_reduce["minimum_gb_per_s"]
    pairs = {node: record["all_reduce_with"] for node, record in found.items() if record.get("all_reduce_with")}
    if not pairs:
        return  # fewer than three nodes
    best = {node: max(others.values(), key=lambda record: record["bus_gb_per_s"]) for node, others in pairs.items()}
    median = statistics.median(record["bus_gb_per_s"] for record in best.values())
    slow = {}
    for node, record in best.items():
        minimum = least(asked, record)
        if record["line_rate_gb_per_s"] is not None:
            minimum = max(minimum, SLOW * median)
        if too_slow(record["bus_gb_per_s"], minimum):
            slow[node] = minimum
    if 2 * len(slow) > len(pairs):
        return  # the network, not a node: the all-reduce over all ranks says it
    for node, minimum in slow.items():
        rates = ", ".join(f"{record['bus_gb_per_s']:.3g} with {other}" for other, record in pairs[node].items())
        words = f"reaches {rates} GB/s bus, {minimum:.3g} are needed (median of the nodes {median:.3g})"
        yield Finding(node, UserError(node, words, f"{EXCLUDE} and have its network cards and cables tested (ibstat, ib_write_bw)"), True)


def check_within(asked: float | None, found: dict[str, dict[str, Any]], all_reduce: dict[str, Any] | None) -> Iterable[Finding]:
    """A ring over all nodes is as fast as its slowest part, so a node that is below the minimum by itself is the one to leave out."""
    if asked is None and all_reduce is not None:
        asked = all_reduce["minimum_gb_per_s"]
    within = {node: record["all_reduce_within"] for node, record in found.items() if record.get("all_reduce_within")}
    rates = {node: record["bus_gb_per_s"] for node, record in within.items()}
    for node, record in within.items():
        minimum = least(asked, record)
        if len(rates) > 2 and record["line_rate_gb_per_s"] is not None:
            minimum = max(minimum, SLOW * statistics.median(rates.values()))
        if too_slow(rates[node], minimum):
            words = f"its own ranks reach {rates[node]:.3g} GB/s bus among themselves, {minimum:.3g} are needed"
            if len(rates) > 1:
                words += f" (median of the nodes {statistics.median(rates.values()):.3g})"
            slow = sum(too_slow(rate, minimum) for rate in rates.values())
            fix = f"{EXCLUDE} and have its links tested (nvidia-smi nvlink --status, nvidia-smi topo -m)"
            yield Finding(node, UserError(node, words, fix), blamed=len(rates) == 1 or 2 * slow <= len(rates))
