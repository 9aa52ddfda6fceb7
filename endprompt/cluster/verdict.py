"""What becomes of a job after an attempt: finished, requeued, stopped for good, or given up, and which nodes it shall avoid."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from endprompt.cluster.attempts import Attempt, failures_folder
from endprompt.errors import EXIT_BAD_INPUT
from endprompt.training.run_files import checkpoint_step
from endprompt.training.stacks import Standing, silent_ranks

FINISHED, REQUEUE, STOPPED, GIVE_UP = "finished", "requeue", "stopped", "give up"

BY_SLURM = 3
"""Attempts that SLURM ended by itself, a death of a node or a preemption without a signal, are more often no fault of the run's:
so many times `max_idle` of them may go by without a checkpoint."""


@dataclass(frozen=True)
class Limits:
    """max_restarts: of one job. max_idle: attempts in a row that brought no new checkpoint."""

    max_restarts: int = 50
    max_idle: int = 3


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, as the batch script saw it.

    exit_code: srun's. trained: the step of training was started. asked: SLURM had asked to stop (time limit or preemption).
    cancelled: it has ended the job (scancel, the time limit itself, or a requeue of its own). hung: the watchdog ended it.
    bad_nodes: unfit by the preflight. stacks: where ranks stood when asked, for the run hung or a save took too long.
    """

    exit_code: int
    trained: bool = True
    asked: bool = False
    cancelled: bool = False
    hung: str = ""
    bad_nodes: tuple[str, ...] = ()
    stacks: tuple[Standing, ...] = ()


@dataclass(frozen=True)
class Verdict:
    action: str
    reason: str
    suspects: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class FailedRank:
    """What slurm/lib/supervise.py wrote of a rank that ended badly."""

    time: float
    node: str
    rank: int
    exit_code: int


def read_failures(run: Path, job: str, restart: int) -> list[FailedRank]:
    """Failures of the ranks of an attempt, the first one first. The others follow from it: their peer is gone."""
    found = []
    for file in failures_folder(run, job, restart).glob("rank-*.json"):
        try:
            facts = json.loads(file.read_text())
            found.append(FailedRank(float(facts["time"]), str(facts["node"]), int(facts["rank"]), int(facts["exit_code"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn by the node's death, which is what it would have told
    return sorted(found, key=lambda failure: failure.time)


def is_finished(status: dict, steps: int) -> bool:
    """Whether status.json says that all `steps` are done, export included; a recipe may have been given more steps since."""
    return status.get("state") == "finished" and status.get("step") == steps


def decide(
    run: Path, job: str, restart: int, attempts: list[Attempt], outcome: Outcome, status: dict, steps: int, limits: Limits
) -> Verdict:
    """The verdict on one attempt of a job. attempts: all of the run, of any job. status: status.json as it is now. steps: the recipe's.

    Steps that reached the disk count, not exit codes: a job that gains something at every attempt may go on failing up to
    max_restarts times, one that gains nothing is given up after max_idle attempts.
    """
    mine = [attempt for attempt in attempts if attempt.job == job and attempt.restart <= restart]
    attempt = mine[-1]
    if is_finished(status, steps) and outcome.exit_code == 0:
        return Verdict(FINISHED, f"finished at step {steps}")
    if (run / "STOP").exists():
        return Verdict(STOPPED, f"{run}/STOP exists: the run stays stopped until it is removed")
    if outcome.cancelled:
        return Verdict(STOPPED, "SLURM ended the job: scancel, the time limit, or a node's death, after which it starts again by itself")
    failures = read_failures(run, job, restart)
    bad_input = [failure for failure in failures if failure.exit_code == EXIT_BAD_INPUT]
    # SLURM kills the other ranks when the first one fails, so srun's own code says little.
    if bad_input or outcome.exit_code == EXIT_BAD_INPUT and not outcome.bad_nodes:
        said = status.get("error") if status.get("state") == "failed" else None
        return Verdict(GIVE_UP, f"bad input, which no restart mends: {said or 'the error line in the log says what'}")

    reason = _reason(outcome, failures, attempt)
    suspects = tuple(outcome.bad_nodes) or _suspects(outcome, failures)
    if len(mine) > limits.max_restarts:
        return Verdict(GIVE_UP, f"{reason}; restarted {limits.max_restarts} times already (MAX_RESTARTS)", suspects)
    idle = _idle(mine, checkpoint_step(run), outcome)
    if idle >= limits.max_idle:
        hint = "raise --time or lower output.save_interval" if outcome.asked else "look at the log before you submit it again"
        return Verdict(GIVE_UP, f"{reason}; {idle} attempts in a row brought no new checkpoint: {hint}", suspects)
    return Verdict(REQUEUE, reason, suspects, _to_exclude(mine, suspects, outcome.bad_nodes))


def check_start(attempts: list[Attempt], limits: Limits) -> Verdict | None:
    """A verdict before anything starts: SLURM's own requeues pass no other check. attempts: of this job. None: go on."""
    if len(attempts) > limits.max_restarts:
        return Verdict(GIVE_UP, f"restarted {limits.max_restarts} times already (MAX_RESTARTS)")
    idle = 0
    for attempt in reversed(attempts):
        if attempt.gained > 0 or (attempt.end and attempt.end["verdict"] != STOPPED):
            break
        idle += 1
    if idle < BY_SLURM * limits.max_idle:
        return None
    return Verdict(
        GIVE_UP, f"SLURM ended {idle} attempts in a row before a new checkpoint: look at their nodes, or lower output.save_interval"
    )


def _suspects(outcome: Outcome, failures: list[FailedRank]) -> tuple[str, ...]:
    if outcome.hung:
        nodes = {rank.node for rank in silent_ranks(outcome.stacks)}
        return tuple(nodes) if len(nodes) == 1 else ()  # on several nodes it is the network or the file server
    return (failures[0].node,) if failures and not outcome.asked else ()


def _reason(outcome: Outcome, failures: list[FailedRank], attempt: Attempt) -> str:
    silent = [f"rank {rank.rank} on {rank.node} did not answer" for rank in silent_ranks(outcome.stacks)]
    return "; ".join([_what_happened(outcome, failures, attempt), *silent[:3]])


def _what_happened(outcome: Outcome, failures: list[FailedRank], attempt: Attempt) -> str:
    if outcome.hung:
        return f"hung: {outcome.hung}"
    if outcome.bad_nodes:
        return f"preflight found {', '.join(outcome.bad_nodes)} unfit"
    if outcome.exit_code == 0:
        asked = "SLURM's signal (time limit or preemption)" if outcome.asked else "a signal"
        return f"saved and stopped on {asked}"
    if failures:
        first = failures[0]
        return f"rank {first.rank} on {first.node} ended first, with exit code {first.exit_code}"
    return f"srun ended with exit code {outcome.exit_code} and no rank said why (nodes {', '.join(attempt.nodes)})"


def _idle(attempts: list[Attempt], step: int, outcome: Outcome) -> int:
    """Attempts in a row, up to the last, that gained no step; step: of the newest checkpoint now.

    Those that SLURM ended, or wanted back before training began, say nothing about the run and are passed over.
    """
    idle = 0
    for attempt in reversed(attempts):
        newest = attempt is attempts[-1]
        if (step if newest else attempt.last_step) > attempt.first_step:
            break
        end = attempt.end or {}
        by_slurm = not newest and (not end or end["verdict"] == STOPPED)
        early = outcome.asked and not outcome.trained if newest else end.get("asked") and not end.get("trained")
        idle += not (by_slurm or early)
    return idle


def _to_exclude(attempts: list[Attempt], suspects: tuple[str, ...], unfit: tuple[str, ...]) -> tuple[str, ...]:
    """All nodes that this job shall avoid: unfit by the preflight at once, else after failing first, or not answering, in two attempts."""
    counted: Counter[str] = Counter(suspects)
    excluded = set(unfit)
    for attempt in attempts:
        if attempt.end:
            counted.update(attempt.end.get("suspects", []))
            excluded.update(attempt.end.get("excluded", []))
    excluded.update(node for node, times in counted.items() if times >= 2)
    return tuple(sorted(excluded))
