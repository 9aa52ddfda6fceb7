"""What becomes of a job after an attempt: finished, requeued, stopped for good, or given up, and which nodes it shall avoid."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from endprompt.cluster.attempts import Attempt, checkpoint_step, failures_folder
from endprompt.errors import EXIT_BAD_INPUT

FINISHED, REQUEUE, STOPPED, GIVE_UP = "finished", "requeue", "stopped", "give up"


@dataclass(frozen=True)
class Limits:
    """max_restarts: of one job. max_idle: attempts in a row that brought no new checkpoint."""

    max_restarts: int = 50
    max_idle: int = 3


@dataclass(frozen=True)
class Outcome:
    """How the step of training ended, as the batch script saw it.

    exit_code: srun's. asked: SLURM had asked to stop (time limit or preemption). cancelled: it has ended the job (scancel,
    the time limit itself, or a requeue of its own). hung: the watchdog ended it. bad_nodes: unfit by the preflight.
    """

    exit_code: int
    asked: bool = False
    cancelled: bool = False
    hung: str = ""
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    action: str
    reason: str
    suspects: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class RankFailure:
    """What slurm/lib/rank.sh wrote of a rank that ended badly."""

    time: float
    node: str
    rank: int
    exit_code: int


def read_failures(run: Path, job: str, restart: int) -> list[RankFailure]:
    """Failures of the ranks of an attempt, the first one first. The others follow from it: their peer is gone."""
    found = []
    for file in failures_folder(run, job, restart).glob("rank-*.json"):
        try:
            facts = json.loads(file.read_text())
            found.append(RankFailure(float(facts["time"]), str(facts["node"]), int(facts["rank"]), int(facts["exit_code"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # torn by the node's death, which is what it would have told
    return sorted(found, key=lambda failure: failure.time)


def decide(run: Path, attempts: list[Attempt], outcome: Outcome, status: dict, limits: Limits) -> Verdict:
    """The verdict on the last of `attempts`, all of the run. status: status.json as it is now.

    Steps that reached the disk count, not exit codes: a job that gains something at every attempt may go on failing up to
    max_restarts times, one that gains nothing is given up after max_idle attempts, whatever ended them.
    """
    attempt = attempts[-1]
    state = status.get("state")
    if state == "finished" and outcome.exit_code == 0:
        return Verdict(FINISHED, f"finished at step {status.get('step')}")
    if (run / "STOP").exists():
        return Verdict(STOPPED, f"{run}/STOP exists: the run stays stopped until it is removed")
    if outcome.cancelled:
        return Verdict(STOPPED, "SLURM ended the job: scancel, the time limit, or a node's death, after which it starts again by itself")
    failures = read_failures(run, attempt.job, attempt.restart)
    bad_input = [failure for failure in failures if failure.exit_code == EXIT_BAD_INPUT]
    # SLURM kills the other ranks when the first one fails, so srun's own code says little.
    if bad_input or outcome.exit_code == EXIT_BAD_INPUT and not outcome.bad_nodes:
        said = status.get("error") if state == "failed" else None
        return Verdict(GIVE_UP, f"bad input, which no restart mends: {said or 'the error line in the log says what'}")

    if outcome.bad_nodes and attempt.restart == 0:  # somebody is there to read it
        unfit = ",".join(outcome.bad_nodes)
        return Verdict(GIVE_UP, f"preflight found {unfit} unfit; mend it, or submit again with sbatch --exclude={unfit}", outcome.bad_nodes)

    reason, suspects = _reason(outcome, failures, attempt), tuple(outcome.bad_nodes)
    if not (suspects or outcome.asked or outcome.hung) and failures:
        suspects = (failures[0].node,)
    same_job = [other for other in attempts if other.job == attempt.job]
    if len(same_job) > limits.max_restarts:
        return Verdict(GIVE_UP, f"{reason}; restarted {limits.max_restarts} times already (MAX_RESTARTS)", suspects)
    idle = _idle(same_job, checkpoint_step(run))
    if idle >= limits.max_idle:
        hint = "raise --time or lower output.save_interval" if outcome.asked else "look at the log before you submit it again"
        return Verdict(GIVE_UP, f"{reason}; {idle} attempts in a row brought no new checkpoint: {hint}", suspects)
    return Verdict(REQUEUE, reason, suspects, _to_exclude(same_job, suspects, outcome.bad_nodes))


def check_start(run: Path, attempts: list[Attempt], limits: Limits) -> Verdict | None:
    """A verdict before anything starts: SLURM's own requeues, after a node's death, pass no other check. None: go on."""
    idle = 0
    for attempt in reversed(attempts):
        if attempt.job != attempts[-1].job or attempt.gained > 0 or attempt.end:
            break
        idle += 1
    if idle < limits.max_idle:
        return None
    return Verdict(GIVE_UP, f"{idle} attempts in a row died without a word and without a new checkpoint: look at their nodes")


def _reason(outcome: Outcome, failures: list[RankFailure], attempt: Attempt) -> str:
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


def _idle(attempts: list[Attempt], step: int) -> int:
    """Attempts in a row, up to the last, that gained no step. step: of the newest checkpoint now."""
    idle = 0
    for attempt in reversed(attempts):
        last = step if attempt is attempts[-1] else attempt.last_step
        if last > attempt.first_step:
            break
        idle += 1
    return idle


def _to_exclude(attempts: list[Attempt], suspects: tuple[str, ...], unfit: tuple[str, ...]) -> tuple[str, ...]:
    """All nodes that this job shall avoid: unfit by the preflight at once, else after failing first in two attempts."""
    counted: Counter[str] = Counter(suspects)
    excluded = set(unfit)
    for attempt in attempts:
        if attempt.end:
            counted.update(attempt.end.get("suspects", []))
            excluded.update(attempt.end.get("excluded", []))
    excluded.update(node for node, times in counted.items() if times >= 2)
    return tuple(sorted(excluded))
