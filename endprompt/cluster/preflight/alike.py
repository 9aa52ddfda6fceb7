"""Nodes of a job must be alike: GPUs, driver, versions, and clocks that agree."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from endprompt.cluster.preflight.findings import EXCLUDE, Finding
from endprompt.errors import UserError

Records = dict[str, dict[str, Any]]


def check_alike(gpus: int | None, head: dict[str, Any], found: Records, skew: float) -> Iterable[Finding]:
    """gpus: asked for, so that their number is held against that and not here. head: its versions decide where the nodes are
    split into equal halves. skew: of clocks, in seconds."""
    hardware = {node: _hardware(record["gpus"], counted=gpus is None) for node, record in found.items()}
    yield from _odd_ones(hardware, {}, "ask for nodes of one kind (sbatch --constraint)")
    versions = {node: record["versions"] for node, record in found.items()}
    yield from _odd_ones(versions, head["versions"], "use one container image or one environment on all nodes")
    yield from _clocks({node: record["clock_at_meeting"] for node, record in found.items() if "clock_at_meeting" in record}, skew)


def _hardware(gpus: dict[str, Any] | None, *, counted: bool) -> dict[str, str]:
    if not gpus or not gpus["names"]:
        return {"GPUs": "none", "driver": "none"} if counted else {}  # too few: says the check of their number
    kinds = sorted(Counter(gpus["names"]).items())
    return {"GPUs": " + ".join(f"{count} x {name}" if counted else name for name, count in kinds), "driver": gpus["driver"] or "unknown"}


def _odd_ones(facts: dict[str, dict[str, str]], preferred: dict[str, str], remedy: str) -> Iterable[Finding]:
    """One line for each node that differs from most; where no value has most, one line that names all and blames none."""
    differences: dict[str, list[str]] = {}
    for key in sorted({key for values in facts.values() for key in values}):
        values = {node: node_facts.get(key, "absent") for node, node_facts in facts.items() if node_facts}
        usual = _usual(list(values.values()), preferred.get(key))
        if usual is None:
            words = ", ".join(f"{node} {value}" for node, value in values.items())
            yield Finding(None, UserError(", ".join(values), f"differ in {key} ({words})", remedy))
            continue
        for node, value in values.items():
            if value != usual:
                differences.setdefault(node, []).append(f"{key} {value} (the others {usual})")
    for node, words in differences.items():
        yield Finding(node, UserError(node, f"has {', '.join(words)}", f"{remedy}, or {EXCLUDE}"), blamed=True)


def _usual(values: list[str], preferred: str | None) -> str | None:
    """The most frequent value; of equally frequent ones the preferred; None where that decides nothing."""
    counts = Counter(values)
    most = max(counts.values())
    candidates = [value for value, count in counts.items() if count == most]
    if len(candidates) == 1:
        return candidates[0]
    return preferred if preferred in candidates else None


def _clocks(clocks: dict[str, float], skew: float) -> Iterable[Finding]:
    """All were read just after one barrier, so what differs is the clocks. Of two nodes nobody knows which is right."""
    if not clocks:
        return  # no meeting took place, which has its own findings
    middle = statistics.median(clocks.values()) if len(clocks) > 2 else min(clocks.values())
    for node, clock in clocks.items():
        if abs(clock - middle) > skew:
            words = f"its clock is {clock - middle:+.1f} s off the others', {skew:g} s are allowed"
            yield Finding(node, UserError(node, words, f"start time synchronisation there (chronyd), or {EXCLUDE}"), len(clocks) > 2)
