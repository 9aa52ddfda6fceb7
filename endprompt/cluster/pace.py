"""How fast a run goes, and what saves and restarts took, from the lines of its log and the starts of its jobs."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

RECENT = 40
"""Logged steps that the speed is taken from."""

TREND = 100
"""Logged steps that the trend of the loss is taken from: batches differ more than two neighbouring weights."""

WANTED = ("stopped", "finished")
"""Verdicts after which somebody wanted the pause: nothing was lost."""


@dataclass(frozen=True)
class Pace:
    """Everything None where the log does not tell.

    step_seconds, tokens_per_second, mfu: medians of the last logged steps. overhead_seconds, restart_seconds: what saves
    and validations, and restarts after failures, added to a step on average so far. lost_seconds: the sum over restarts of
    the time between the last step kept and the first step after it. longest_silence_seconds: between two lines of one start.
    """

    step_seconds: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    overhead_seconds: float | None = None
    restart_seconds: float | None = None
    lost_seconds: float | None = None
    longest_silence_seconds: float | None = None

    def seconds_for(self, steps: int) -> float | None:
        """Predicted wall-clock seconds for `steps` more steps, with saves and restarts as they were so far."""
        if self.step_seconds is None:
            return None
        return steps * (self.step_seconds + (self.overhead_seconds or 0) + (self.restart_seconds or 0))


def measure(lines: list[dict], attempts: list[dict], starts: int) -> Pace:
    """lines: the training lines of log.jsonl. attempts: attempts.jsonl. starts: of status.json."""
    recent = lines[-RECENT:]
    # The first step of a start compiles kernels and fills caches; it is no measure unless there is no other.
    timed = [line for line in recent if line is not lines[0]] or recent
    medians = {name: _median(timed, name) for name in ("step_seconds", "tokens_per_second", "mfu")}
    lines = [line for line in lines if _number(line.get("time")) and _number(line.get("step_seconds"))]
    if not lines:  # logs of older versions say no time
        return Pace(**medians)

    began = [(event["time"], _why_ended(attempts[:index])) for index, event in enumerate(attempts) if event["event"] == "start"]
    gaps = []  # (seconds between two lines, seconds of them that no step took, starts in between)
    for before, after in zip(lines, lines[1:], strict=False):
        seconds, steps = after["time"] - before["time"], after["step"] - before["step"]
        idle = max(0.0, seconds - steps * after["step_seconds"])
        gaps.append((seconds, idle, [why for at, why in began if before["time"] < at <= after["time"]]))
    if not began and starts > 1:
        # Nobody wrote down when it was started again: the longest gaps are taken for it, and a pause for a restart.
        longest = sorted(range(len(gaps)), key=lambda index: gaps[index][1], reverse=True)[: starts - 1]
        gaps = [(*gap[:2], ["unknown"] if index in longest else []) for index, gap in enumerate(gaps)]

    steps = lines[-1]["step"] - lines[0]["step"]
    restarts = [(idle, found) for _, idle, found in gaps if found]
    early = [at for at, _ in began if at <= lines[0]["time"]]  # starts that came to nothing before a step was kept
    lost = (max(early) - min(early) if early else 0) + sum(idle for idle, found in restarts if not set(found) & set(WANTED))
    # Without attempts.jsonl a pause overnight cannot be told from a crash, so it does not go into what is left.
    failures = sum(idle for idle, found in restarts if set(found) <= {"requeue", None})
    return Pace(
        **medians,
        overhead_seconds=sum(idle for _, idle, found in gaps if not found) / steps if steps else None,
        restart_seconds=failures / steps if steps else None,
        lost_seconds=lost,
        longest_silence_seconds=max((seconds for seconds, _, found in gaps if not found), default=None),
    )


def _why_ended(earlier: list[dict]) -> str | None:
    """Verdict on the attempt before a start; None when it died without one."""
    return earlier[-1].get("verdict") if earlier and earlier[-1]["event"] == "end" else None


def loss_trend(lines: list[dict]) -> tuple[float | None, int | None, str | None]:
    """(change, steps, word): mean loss of the later half of the last lines less that of the earlier half.

    word: falling, rising or flat, where flat is within twice the standard error; None for fewer than 8 lines.
    """
    recent = [line for line in lines[-TREND:] if _number(line.get("loss"))]
    if len(recent) < 8:
        return None, None, None
    losses, half = [line["loss"] for line in recent], len(recent) // 2
    early, late = losses[:half], losses[half:]
    change = statistics.fmean(late) - statistics.fmean(early)
    error = math.sqrt(statistics.variance(early) / len(early) + statistics.variance(late) / len(late))
    word = "flat" if abs(change) <= 2 * error else "falling" if change < 0 else "rising"
    return change, recent[-1]["step"] - recent[0]["step"], word


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _median(lines: list[dict], name: str) -> float | None:
    values = [line[name] for line in lines if _number(line.get(name))]
    return statistics.median(values) if values else None
