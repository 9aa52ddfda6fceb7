"""What a run is doing, from its folder alone: no torch, no process list, no questions to SLURM.

Reads recipe.yaml, status.json, log.jsonl and checkpoints/ (endprompt/training/run_folder.py), and attempts.jsonl, to which
a SLURM launcher appends one line when a job starts and one when it ends; a run without SLURM has none.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endprompt.cluster import pace
from endprompt.errors import UserError
from endprompt.training import run_files

SILENCE_SECONDS = 600
"""A running run that has written nothing for at least this long, and much longer than a step or a save took, is probably dead."""

STARTUP_SECONDS = 1800
"""The same before the first step of a start: loading 70B, converting a checkpoint to another number of ranks, compiling."""

OWN_FILES = ("recipe.yaml", "status.json", "log.jsonl", "attempts.jsonl", "checkpoints", "STOP", ".lock")
RECENT_RESTARTS = 3


@dataclass(frozen=True)
class Status:
    """None: not known, or not there. mfu: a fraction.

    state: running, finished, interrupted, stopped, failed as status.json has it; `not started`; `probably dead` (running, but
    silent for too long); from attempts.jsonl `starting` (a job began, no step yet) and `requeued` (ended, waits to run again).
    left_seconds: for the steps that are left once it runs, from the median step and the overhead seen.
    """

    folder: str
    recipe: str
    state: str
    state_reason: str
    job: str | None
    nodes: list[str]
    silent_seconds: float | None
    step: int
    steps: int | None
    percent: float | None
    tokens: int | None
    loss: float | None
    loss_change: float | None
    loss_change_steps: int | None
    loss_trend: str | None
    validation_loss: float | None
    validation_step: int | None
    step_seconds: float | None
    tokens_per_second: float | None
    mfu: float | None
    overhead_seconds_per_step: float | None
    restart_seconds_per_step: float | None
    left_seconds: float | None
    checkpoint_step: int | None
    checkpoint_age_seconds: float | None
    checkpoint_bytes: int | None
    checkpoint_bytes_is_lower_bound: bool
    disk_free_bytes: int | None
    starts: int
    restarts: int
    recent_restarts: list[dict[str, Any]]
    excluded_nodes: list[str]
    lost_hours: float | None
    exit_code: int | None
    error: str | None

    def as_dict(self) -> dict:
        """For JSON: what is not a finite number becomes None."""
        return {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in asdict(self).items()}


def read(folder: Path, now: float | None = None) -> Status:
    """The status of the run in `folder` at Unix time `now`. Raises UserError for no run folder and for a damaged file."""
    now = time.time() if now is None else now
    if not any((folder / name).exists() for name in OWN_FILES):
        problem = "is no run folder (none of its files is there)" if folder.is_dir() else "is no folder"
        raise UserError(folder, problem, "name a folder that a recipe has in output.directory")
    status, recipe = run_files.read_status(folder), run_files.read_recipe(folder)
    log = run_files.read_lines(folder / "log.jsonl", {"step": int})
    attempts = run_files.read_lines(folder / "attempts.jsonl", {"event": str, "time": (int, float)})
    attempts = [event for event in attempts if event["event"] in ("start", "end")]
    lines = [line for line in log if "loss" in line]
    validations = [line for line in log if "validation_loss" in line]
    checkpoint = run_files.newest_checkpoint(folder)

    starts, jobs = _whole(status.get("starts")) or 0, [event for event in attempts if event["event"] == "start"]
    speed = pace.measure(lines, attempts, starts)
    written = _last_write(folder, status, log)
    state, reason = _state(folder, status, lines, attempts, speed, written, now)
    steps = _whole(status.get("steps"))
    in_checkpoint = checkpoint.step if checkpoint and state != "running" else 0  # log_interval may skip the step saved last
    step = max(_whole(status.get("step")) or 0, lines[-1]["step"] if lines else 0, in_checkpoint)
    tokens_per_step = lines[-1].get("tokens", 0) // lines[-1]["step"] if lines and lines[-1]["step"] else None
    change, change_steps, word = pace.loss_trend(lines)
    ended = attempts[-1] if attempts and attempts[-1]["event"] == "end" else {}
    given_up = ended.get("reason") if ended.get("verdict") == "give up" else None
    return Status(
        folder=str(folder),
        recipe=str(recipe.get("name") or folder.resolve().name),
        state=state,
        state_reason=reason,
        job=str(jobs[-1]["job"]) if jobs and "job" in jobs[-1] else None,
        nodes=_names(jobs[-1].get("nodes")) if jobs else [],
        silent_seconds=max(0.0, now - written) if written else None,
        step=step,
        steps=steps,
        percent=100 * step / steps if steps else None,
        tokens=step * tokens_per_step if tokens_per_step is not None else None,
        loss=lines[-1]["loss"] if lines else None,
        loss_change=change,
        loss_change_steps=change_steps,
        loss_trend=word,
        validation_loss=validations[-1]["validation_loss"] if validations else None,
        validation_step=validations[-1]["step"] if validations else None,
        step_seconds=speed.step_seconds,
        tokens_per_second=speed.tokens_per_second,
        mfu=speed.mfu,
        overhead_seconds_per_step=speed.overhead_seconds,
        restart_seconds_per_step=speed.restart_seconds,
        left_seconds=0.0 if state == "finished" else speed.seconds_for(steps - step) if steps else None,
        checkpoint_step=checkpoint.step if checkpoint else None,
        checkpoint_age_seconds=max(0.0, now - checkpoint.written) if checkpoint else None,
        checkpoint_bytes=checkpoint.size if checkpoint else None,
        checkpoint_bytes_is_lower_bound=bool(checkpoint and not checkpoint.whole_size),
        disk_free_bytes=run_files.disk_free(folder),
        starts=max(starts, len(jobs)),
        restarts=max(starts, len(jobs), 1) - 1,
        recent_restarts=_restarts(attempts)[-RECENT_RESTARTS:],
        excluded_nodes=list(dict.fromkeys(node for event in attempts for node in _names(event.get("excluded")))),
        lost_hours=speed.lost_seconds / 3600 if speed.lost_seconds is not None else None,
        exit_code=_whole(status.get("exit_code")),
        error=status.get("error") or given_up,
    )


def _state(
    folder: Path, status: dict, lines: list[dict], attempts: list[dict], speed: pace.Pace, written: float | None, now: float
) -> tuple[str, str]:
    """(state, what is known about it besides)."""
    state, updated = str(status.get("state") or "not started"), run_files.unix_time(status.get("updated")) or 0.0
    stop = "STOP is there: it stays stopped until the file is removed" if (folder / "STOP").exists() else ""
    last = attempts[-1] if attempts else None
    if last and last["time"] + 1 > updated:  # status.json counts whole seconds
        ago, reason = duration(now - last["time"]), last.get("reason") or ""
        if last["event"] == "start":
            late = now - max(last["time"], written or 0) > STARTUP_SECONDS
            return ("probably dead" if late else "starting"), f"job {last.get('job')} began {ago} ago and has not made a step"
        verdict = last.get("verdict")
        if verdict == "requeue":
            return "requeued", f"waits for {ago} to start again: {reason}" if reason else f"waits for {ago} to start again"
        if verdict in ("give up", "stopped", "finished"):
            return {"give up": "failed"}.get(verdict, verdict), stop or reason
    if state != "running":
        return state, stop
    # Nothing after the line of status.json that a start writes: loading and compiling take longer than steps.
    first_step = not lines or updated - lines[-1].get("time", updated) > 5
    limit = STARTUP_SECONDS if first_step else SILENCE_SECONDS
    limit = max(limit, 10 * (speed.step_seconds or 0), 3 * (speed.longest_silence_seconds or 0))
    silent = now - written if written else 0.0
    if silent > limit:
        return "probably dead", f"nothing written for {duration(silent)}, more than the {duration(limit)} that steps and saves explain"
    return state, "STOP is there: it saves and stops after this step" if stop else ""


def _last_write(folder: Path, status: dict, log: list[dict]) -> float | None:
    """Unix time of the last sign of life. The run's own clock where it wrote the time down: a copied folder is no sign."""
    times = [run_files.unix_time(status.get("updated")), log[-1].get("time", run_files.modified(folder / "log.jsonl")) if log else None]
    if status.get("state") in (None, "running"):
        times.append(run_files.newest_unfinished_write(folder))
    return max((at for at in times if at is not None), default=None)


def _restarts(attempts: list[dict]) -> list[dict]:
    """Every start but the first: when, from which step, and why the attempt before it ended."""
    found = []
    for index, event in enumerate(attempts):
        if event["event"] == "start" and index:
            end = attempts[index - 1] if attempts[index - 1]["event"] == "end" else {}
            found.append(
                {
                    "unix_seconds": event["time"], "job": str(event.get("job")), "step": event.get("step"), "verdict": end.get("verdict"),
                    "exit_code": end.get("exit_code"), "excluded": _names(end.get("excluded")),
                    "reason": end.get("reason") or "no end was written: the first node died, or the job was cancelled",
                }
            )  # fmt: skip
    return found


def _names(value: object) -> list[str]:
    """A list of names; one name, or SLURM's short form of many, is a list of one."""
    return [str(name) for name in value] if isinstance(value, list) else [value] if isinstance(value, str) and value else []


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min, 2 d 5 h."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"
