"""Records of a good preflight of any number of nodes with 8 H100 each, for faults to be planted in."""

from __future__ import annotations

import copy
import json
from pathlib import Path

VERSIONS = {
    "python": "3.12.3", "torch": "2.13.0", "nccl": "2.27.5", "deepspeed": "0.19.8", "megatron-core": "0.19.2", "transformers": "5.23.0",
    "transformer-engine": "2.9.0",
}  # fmt: skip


def names(count: int) -> list[str]:
    return [f"node{number:02d}" for number in range(1, count + 1)]


def write_records(directory: Path, count: int, spoil=None) -> Path:
    """spoil: changes {"head": ..., "all_reduce": ..., "nodes": {name: ...}, "errors": {rank: ...}} before it is written."""
    records = {
        "head": {"token": "1234", "time": 1000.0, "hostname": "node01", "versions": dict(VERSIONS), "commit": "c0ffee", "recipe": {},
                 "run_folder": "/shared/run", "engine": "megatron", "nodes": count, "processes_per_node": 8},
        "all_reduce": {**_measured(8 * count, 310.0, 400.0), "world_size": 8 * count, "backend": "nccl", "minimum_gb_per_s": None},
        "nodes": {name: _node(name, number, count) for number, name in enumerate(names(count))},
        "errors": {},
    }  # fmt: skip
    if spoil:
        spoil(records)
    directory.mkdir(parents=True)
    files = {"head.json": records["head"], "all_reduce.json": records["all_reduce"]}
    files |= {f"node-{name}.json": record for name, record in records["nodes"].items()}
    files |= {f"rank-{rank}.error.json": record for rank, record in records["errors"].items()}
    for name, record in files.items():
        if record is not None:
            (directory / name).write_text(record if isinstance(record, str) else json.dumps(record))
    return directory


def _measured(ranks: int, bus: float, line_rate: float) -> dict:
    factor = 2 * (ranks - 1) / ranks
    return {"ranks": ranks, "bytes": 10**9, "median_seconds": factor / bus, "algorithm_gb_per_s": bus / factor, "bus_gb_per_s": bus,
            "line_rate_gb_per_s": line_rate}  # fmt: skip


def _node(name: str, number: int, count: int) -> dict:
    neighbours = [names(count)[(number + step) % count] for step in (1, -1)] if count > 2 else []
    return copy.deepcopy(
        {
            "node": name, "hostname": name, "ranks": list(range(8 * number, 8 * number + 8)), "token": "1234",
            "gpus": {"count": 8, "names": ["NVIDIA H100 80GB HBM3"] * 8, "driver": "550.54.15", "uncorrected_ecc": [0] * 8},
            "clock": 1003.0, "versions": dict(VERSIONS), "free_gb": {"run_folder": 9000.0, "/dev/shm": 500.0, "temporary": 300.0},
            "clock_at_meeting": 1010.0, "all_reduce_within": _measured(8, 370.0, 450.0),
            "all_reduce_with": {neighbour: _measured(16, 330.0, 400.0) for neighbour in neighbours},
        }
    )  # fmt: skip


def error_record(rank: int, node: str, problem: str, cause: str, missing: list[int] | None = None) -> dict:
    fix = "exclude the node or mend it"
    return {"rank": rank, "node": node, "error": f"{node}: rank {rank}: {problem}; {fix}", "problem": problem, "fix": fix, "cause": cause,
            "missing_ranks": missing or []}  # fmt: skip
