"""The preflight's last part: read what the ranks left, name what is wrong and which nodes to leave out. Needs no torch."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.atomic import write_json
from endprompt.cluster.preflight import records
from endprompt.cluster.preflight.alike import check_alike
from endprompt.cluster.preflight.findings import EXCLUDE, Finding, unless_systemic
from endprompt.cluster.preflight.links import check_all_reduce, check_pairs, check_within
from endprompt.errors import EXIT_BAD_INPUT, UserError, from_os_error

SCRATCH_GB = 0.1
"""Least free space of /dev/shm and the temporary folder. A container's default /dev/shm of 64 MB is too small for NCCL's buffers."""


@dataclass(frozen=True)
class Wanted:
    """gpus: a node, 0 for a run on CPUs, None for any number. minimum: bus bandwidth, 10^9 bytes/s. skew: seconds."""

    directory: Path
    nodes: list[str]
    gpus: int | None = None
    minimum: float | None = None
    skew: float = 5.0


def judge(wanted: Wanted) -> int:
    """Print findings or the table, and always write verdict.json. Returns the exit code."""
    found: dict[str, dict[str, Any]] = {}
    all_reduce = None
    try:
        head = _read_head(wanted.directory)
        found = {node: record for node in wanted.nodes if (record := records.read_if_there(records.node_path(wanted.directory, node)))}
        all_reduce = records.read_if_there(wanted.directory / records.ALL_REDUCE)
        findings = list(examine(wanted, head, found, all_reduce, records.read_errors(wanted.directory)))
    except (UserError, OSError, KeyError, TypeError) as problem:  # the last two: a record that another version wrote
        findings = [_unreadable(wanted, problem)]
    bad = sorted({finding.node for finding in findings if finding.blamed})
    lines = [str(finding.line) for finding in findings]
    write_json(wanted.directory / records.VERDICT, {"ok": not lines, "errors": lines, "bad_nodes": bad})
    for line in lines:
        print(f"error: {line}", file=sys.stderr, flush=True)
    if lines:
        return EXIT_BAD_INPUT
    print(table(wanted, found))
    print(f"{records.describe_all_reduce(all_reduce)}; every sum was right")
    return 0


def _read_head(directory: Path) -> dict[str, Any]:
    try:
        return records.read_record(directory / records.HEAD)
    except FileNotFoundError:
        raise UserError(directory / records.HEAD, "is not there", "run `preflight.py head --records` first and let it pass") from None


def _unreadable(wanted: Wanted, problem: Exception) -> Finding:
    if isinstance(problem, OSError):
        problem = from_os_error(problem)
    if not isinstance(problem, UserError):
        words = f"a record lacks what it should hold ({type(problem).__name__}: {problem})"
        problem = UserError(wanted.directory, words, "run the preflight again from its head on, with one version of the code")
    return Finding(None, problem)


def examine(
    wanted: Wanted, head: dict[str, Any], found: dict[str, dict[str, Any]], all_reduce: dict[str, Any] | None, errors: list[dict[str, Any]]
) -> Iterable[Finding]:
    """Every finding. found: the records of nodes that left one."""
    nodes = wanted.nodes
    stopped = list(_rank_errors(wanted, found, errors))
    yield from stopped
    explained = {finding.node for finding in stopped}
    yield from unless_systemic(nodes, _no_record(wanted, found, explained))
    yield from unless_systemic(nodes, _not_shared(wanted, head, found, explained))
    yield from unless_systemic(nodes, _too_few_gpus(wanted, found, explained))
    yield from _ecc(found)
    yield from unless_systemic(nodes, _no_room(found))
    yield from check_alike(wanted.gpus, head, found, wanted.skew)
    slow = list(check_within(wanted.minimum, found, all_reduce))
    yield from slow
    named = {finding.node for finding in slow}
    yield from (finding for finding in check_pairs(wanted.minimum, found, all_reduce) if finding.node not in named)
    if all_reduce is not None:
        yield from check_all_reduce(wanted.minimum, all_reduce)
        for node, record in found.items():
            if "clock_at_meeting" not in record and node not in explained:
                fix = f"read the job's output for its ranks, or {EXCLUDE}"
                yield Finding(node, UserError(node, "its record ends before the all-reduces, which took place without it", fix))
    elif not stopped and len(found) == len(nodes):
        path = wanted.directory / records.ALL_REDUCE
        yield Finding(None, UserError(path, "is not there: the ranks ended before they measured", "read the job's output for the reason"))


def _rank_errors(wanted: Wanted, found: dict[str, dict[str, Any]], errors: list[dict[str, Any]]) -> Iterable[Finding]:
    """One line a node and problem. What ranks were told by others is said only where nothing says it better."""
    missing = {rank for error in errors for rank in error["missing_ranks"]}
    lost = {node: [rank for rank in record["ranks"] if rank in missing] for node, record in found.items()}
    lost = {node: ranks for node, ranks in lost.items() if ranks}
    for node, ranks in lost.items():
        words, fix = f"{_ranks(ranks)} did not come to the meeting of ranks", f"read the job's output for them, or {EXCLUDE}"
        yield Finding(node, UserError(node, words, fix), 2 * len(lost) <= max(2, len(wanted.nodes)))
    firsthand = [error for error in errors if error["cause"] != "elsewhere"]
    said_better = lost or set(wanted.nodes) - found.keys()
    shown = firsthand or ([] if said_better else errors)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for error in shown:
        groups.setdefault((error["node"], error["problem"]), []).append(error)
    culprits = {error["node"] for error in firsthand if error["cause"] == "own"}
    for (node, problem), group in groups.items():
        blamed = group[0]["cause"] == "own" and 2 * len(culprits) <= max(2, len(wanted.nodes))
        yield Finding(node, UserError(f"{node}: {_ranks([error['rank'] for error in group])}", problem, group[0]["fix"]), blamed)


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _no_record(wanted: Wanted, found: dict[str, dict[str, Any]], explained: set[str | None]) -> Iterable[Finding]:
    for node in wanted.nodes:
        if node not in found and node not in explained:
            words = f"left no record in {wanted.directory}: its ranks did not start, or it does not share that file system"
            fix = f"read the job's output for it; put --records on a shared file system, or {EXCLUDE}"
            yield Finding(node, UserError(node, words, fix))


def _not_shared(wanted: Wanted, head: dict, found: dict[str, dict[str, Any]], explained: set[str | None]) -> Iterable[Finding]:
    for node, record in found.items():
        if record["token"] != head["token"] and node not in explained:
            saw = "saw no" if record["token"] is None else "saw another preflight's"
            fix = f"put --records and the run folder on a file system that all nodes share, or {EXCLUDE}"
            yield Finding(node, UserError(node, f"{saw} {wanted.directory / records.HEAD}", fix))
        elif record["token"] == head["token"] and record["free_gb"]["run_folder"] is None:
            fix = f"set output.directory to a file system that all nodes share, or {EXCLUDE}"
            yield Finding(node, UserError(node, f"does not see the run folder {head['run_folder']}", fix))


def _too_few_gpus(wanted: Wanted, found: dict[str, dict[str, Any]], explained: set[str | None]) -> Iterable[Finding]:
    for node, record in found.items():
        count = record["gpus"]["count"] if record["gpus"] else 0
        if wanted.gpus and count < wanted.gpus and node not in explained:
            yield Finding(node, UserError(node, f"has {count} GPUs, {wanted.gpus} were asked for", f"{EXCLUDE}, or ask for fewer a node"))


def _ecc(found: dict[str, dict[str, Any]]) -> Iterable[Finding]:
    for node, record in found.items():
        counts = record["gpus"]["uncorrected_ecc"] if record["gpus"] else []
        if broken := {index: count for index, count in enumerate(counts) if count}:
            words = ", ".join(f"GPU {index}: {count}" for index, count in broken.items())
            fix = f"{EXCLUDE} and have it drained: a GPU reset clears the count, memory that fails again wants replacing"
            yield Finding(node, UserError(node, f"has uncorrected memory errors ({words})", fix), blamed=True)


def _no_room(found: dict[str, dict[str, Any]]) -> Iterable[Finding]:
    for node, record in found.items():
        for name in ("/dev/shm", "temporary"):
            free = record["free_gb"][name]
            if free is not None and free < SCRATCH_GB:
                place = name if name.startswith("/") else "the temporary folder"
                fix = f"give the container a larger one or clear it, or {EXCLUDE}"
                yield Finding(node, UserError(node, f"has {free:g} GB free in {place}, {SCRATCH_GB:g} are needed", fix))


def table(wanted: Wanted, found: dict[str, dict[str, Any]]) -> str:
    """node, GPUs, driver, torch, clock offset against the median, all-reduce within the node and with its neighbours."""
    middle = statistics.median(record["clock_at_meeting"] for record in found.values())
    rows = [("node", "GPUs", "driver", "torch", "clock", "within the node", "with neighbours")]
    for node in wanted.nodes:
        record = found[node]
        gpus, within = record["gpus"], record["all_reduce_within"]
        kinds = f"{gpus['count']} x {gpus['names'][0]}" if gpus else "CPU"
        rate = f"{within['bus_gb_per_s']:.3g} GB/s" if within else "one rank"
        offset = f"{record['clock_at_meeting'] - middle:+.3f} s"
        pairs = ", ".join(f"{pair['bus_gb_per_s']:.3g}" for pair in record["all_reduce_with"].values())
        driver = (gpus["driver"] or "unknown") if gpus else "-"
        rows.append((node, kinds, driver, record["versions"]["torch"], offset, rate, f"{pairs} GB/s" if pairs else "-"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
