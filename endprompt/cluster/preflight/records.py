"""The folder of a preflight's records: which file holds what, and reading them with one line for what is wrong.

head.json               written by `head`: a random token, the batch host's versions, recipe, run folder
node-NAME.json          written by the first local rank of a node: GPUs, driver, versions, clock, free space, its all-reduces
all_reduce.json         written by rank 0: bandwidth over all ranks
rank-R.error.json       what stopped rank R
verdict.json            written by `judge`: {"ok", "errors", "bad_nodes"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from endprompt.errors import UserError

HEAD, ALL_REDUCE, VERDICT = "head.json", "all_reduce.json", "verdict.json"
PATTERNS = (HEAD, ALL_REDUCE, VERDICT, "node-*.json", "rank-*.error.json", ".*.tmp")


def node_path(directory: Path, node: str) -> Path:
    return directory / f"node-{node}.json"


def error_path(directory: Path, rank: int) -> Path:
    return directory / f"rank-{rank}.error.json"


def make_empty(directory: Path) -> None:
    """Make the folder, or remove the records of an earlier preflight from it; nothing else is ever removed. Raises UserError."""
    directory.mkdir(parents=True, exist_ok=True)
    old = [path for pattern in PATTERNS for path in directory.glob(pattern)]
    others = sorted(set(directory.iterdir()) - set(old))
    if others:
        raise UserError(directory, f"holds {others[0].name}, which is no record of a preflight", "give --records a folder of its own")
    for path in old:
        path.unlink()


def read_record(path: Path) -> dict[str, Any]:
    """Raises FileNotFoundError where it is not there, UserError where it is no JSON object."""
    try:
        record = json.loads(path.read_text())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise UserError(path, "holds no JSON object", "run the preflight again from its head on")
    return record


def read_if_there(path: Path) -> dict[str, Any] | None:
    try:
        return read_record(path)
    except FileNotFoundError:
        return None


def read_errors(directory: Path) -> list[dict[str, Any]]:
    """What stopped ranks, by rank."""
    return sorted((read_record(path) for path in directory.glob("rank-*.error.json")), key=lambda record: record["rank"])


def describe_all_reduce(record: dict[str, Any]) -> str:
    """One line of what all_reduce.json holds."""
    if record["ranks"] == 1:
        return "all-reduce: one rank, no link to measure"
    rates = f"{record['bus_gb_per_s']:.3g} GB/s bus, {record['algorithm_gb_per_s']:.3g} GB/s algorithm"
    return f"all-reduce: {rates}, {record['bytes'] / 1e6:g} MB over {record['ranks']} ranks ({record['backend']})"
