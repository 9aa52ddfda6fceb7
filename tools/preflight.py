#!/usr/bin/env python3
"""Check a job before a GPU-hour is spent.

    # 1. on the batch host, or on a login node as a dry run: recipe, checkpoint, tokenizer, data, layout, memory, disk
    python tools/preflight.py head --recipe recipes/llama3_70b_128k.yaml --engine megatron --nodes 8 --processes-per-node 8 --records DIR
    # 2. on every rank: GPUs, driver, versions, clock, shared folder, all-reduce bandwidth
    srun ... python tools/preflight.py rank --records DIR --gpus 8
    # 3. on the batch host again: what is wrong, and which nodes to exclude
    python tools/preflight.py judge --records DIR --nodes node01,node02 --gpus 8

Exit codes: 0 all good; 2 something is wrong, one line each on stderr says what and how to mend it. `judge` also writes
DIR/verdict.json: {"ok": bool, "errors": [lines], "bad_nodes": [nodes to exclude]}. DIR must lie on a shared file system.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.errors import UserError, run_command
from endprompt.recipe import add_recipe_arguments


def main() -> int:
    arguments = parse_arguments()
    if arguments.part == "head":
        from endprompt.cluster.preflight.head import Job, head

        job = Job(
            arguments.recipe, arguments.overrides, arguments.engine, arguments.nodes, arguments.processes_per_node, arguments.device,
            arguments.gpu,
        )  # fmt: skip
        return head(job, arguments.records)
    if arguments.part == "rank":
        from endprompt.cluster.preflight.rank import Settings, run

        return run(
            Settings(arguments.records, arguments.gpus, arguments.all_reduce_mb, arguments.min_bandwidth_gbps, arguments.timeout_seconds)
        )
    from endprompt.cluster.preflight.judge import Wanted, judge

    nodes = [node for node in arguments.nodes.split(",") if node]
    if not nodes or len(set(nodes)) < len(nodes):
        raise UserError("--nodes", f"is {arguments.nodes!r}", "name every node once: --nodes node01,node02")
    return judge(Wanted(arguments.records, nodes, arguments.gpus, arguments.min_bandwidth_gbps, arguments.max_clock_skew))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parts = parser.add_subparsers(dest="part", required=True, metavar="{head,rank,judge}")

    head = parts.add_parser("head", help="what one machine can check; needs no cluster and no GPU", allow_abbrev=False)
    add_recipe_arguments(head)
    head.add_argument("--engine", choices=("deepspeed", "megatron"), required=True)
    head.add_argument("--nodes", type=int, required=True, metavar="N")
    head.add_argument("--processes-per-node", type=int, required=True, metavar="P", help="ranks a node, one a GPU")
    head.add_argument("--records", type=Path, metavar="DIR", help="folder for the records of this preflight; emptied of older ones")
    head.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: leave the planner's check of GPU memory out")
    head.add_argument("--gpu", choices=("h100-80gb", "h200-141gb"), default="h100-80gb", help="GPU to plan for (default h100-80gb)")

    rank = parts.add_parser("rank", help="one process a rank, started by srun", allow_abbrev=False)
    judge = parts.add_parser("judge", help="read the records, name bad nodes", allow_abbrev=False)
    for part in (rank, judge):
        part.add_argument("--records", type=Path, required=True, metavar="DIR", help="the folder given to head")
        part.add_argument("--gpus", type=int, metavar="G", help="GPUs that every node must have; 0: a run on CPUs (default: what is there)")
        part.add_argument(
            "--min-bandwidth-gbps", type=float, metavar="B",
            help="least bus bandwidth in 10^9 bytes/s (default: over NCCL a quarter of the links' rate, 100 for nodes of 8; over gloo any)",
        )  # fmt: skip
    rank.add_argument("--all-reduce-mb", type=float, metavar="M", help="size of the all-reduce in 10^6 bytes (default 1000, over gloo 8)")
    rank.add_argument("--timeout-seconds", type=float, default=120.0, metavar="S", help="longest that any phase may take (default 120)")
    judge.add_argument("--nodes", required=True, metavar="NODE,NODE", help="all nodes of the job, as in SLURMD_NODENAME")
    judge.add_argument("--max-clock-skew", type=float, default=5.0, metavar="S", help="seconds a clock may be off (default 5)")

    arguments = parser.parse_args()
    _check_numbers(vars(arguments))
    return arguments


def _check_numbers(given: dict) -> None:
    for name in ("nodes", "processes_per_node", "all_reduce_mb", "timeout_seconds", "max_clock_skew"):
        value = given.get(name)
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}", f"is {value:g}", "give a number above 0")
    for name in ("gpus", "min_bandwidth_gbps"):
        value = given.get(name)
        if value is not None and not value >= 0:
            raise UserError(f"--{name.replace('_', '-')}", f"is {value:g}", "give 0 or more")


if __name__ == "__main__":
    run_command(main)
