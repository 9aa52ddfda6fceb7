"""The attempts of a run: every start of its job and how it ended, one JSON object a line in RUN/attempts.jsonl.

    {"event": "start", "time": 1764053000.0, "job": "123", "restart": 0, "nodes": ["node01", "node02"], "step": 0}
    {"event": "end", "time": 1764056600.0, "job": "123", "restart": 0, "exit_code": 137, "step": 40,
     "verdict": "requeue", "reason": "...", "trained": true, "suspects": ["node02"], "excluded": []}

A start without an end is an attempt that took the batch script with it: its node died, or somebody cancelled the job.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from endprompt.training.run_files import checkpoint_step, read_lines


@dataclass(frozen=True)
class Attempt:
    """One start of a job on a run. first_step, last_step: of the newest checkpoint, before and after. end: None where none was written."""

    job: str
    restart: int
    nodes: tuple[str, ...]
    started: float
    first_step: int
    last_step: int
    end: dict | None

    @property
    def gained(self) -> int:
        """Steps that this attempt brought to the disk."""
        return self.last_step - self.first_step


def attempts_file(run: Path) -> Path:
    return run / "attempts.jsonl"


def failures_folder(run: Path, job: str, restart: int) -> Path:
    """Where slurm/lib/supervise.py leaves one line of each rank that failed in this attempt."""
    return run / "attempts" / f"{job}-{restart}"


def stacks_folder(run: Path, job: str, restart: int) -> Path:
    """Where ranks write their stacks when the attempt hangs (endprompt/training/stacks.py)."""
    return failures_folder(run, job, restart) / "stacks"


def record_start(run: Path, job: str, restart: int, nodes: list[str]) -> None:
    _append(run, {"event": "start", "job": job, "restart": restart, "nodes": nodes, "step": checkpoint_step(run)})


def record_end(run: Path, job: str, restart: int, facts: dict) -> None:
    _append(run, {"event": "end", "job": job, "restart": restart, "step": checkpoint_step(run), **facts})


def _append(run: Path, event: dict) -> None:
    run.mkdir(parents=True, exist_ok=True)
    file = attempts_file(run)
    written = file.read_bytes() if file.exists() else b""
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:  # the batch host died while it wrote
        os.truncate(file, len(whole))
    with open(file, "a") as stream:
        stream.write(json.dumps({**event, "time": time.time()}) + "\n")


def read_attempts(run: Path) -> list[Attempt]:
    """All attempts, oldest first. A torn last line is left out; raises UserError for one that makes no sense."""
    needs = {"event": str, "job": str, "restart": int, "time": (int, float), "step": int}
    events = read_lines(attempts_file(run), needs)
    starts = [event for event in events if event["event"] == "start"]
    ends = {(event["job"], event["restart"]): event for event in events if event["event"] == "end"}
    attempts = []
    for index, start in enumerate(starts):
        key = (start["job"], start["restart"])
        following = starts[index + 1]["step"] if index + 1 < len(starts) else checkpoint_step(run)
        end = ends.get(key)
        last = end["step"] if end else following
        attempts.append(Attempt(*key, tuple(start.get("nodes", [])), start["time"], start["step"], last, end))
    return attempts
