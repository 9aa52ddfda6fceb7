"""The status of runs for people: a block of lines for one, a table for several."""

from __future__ import annotations

import time

from endprompt.cluster.status import Status, duration


def block(status: Status) -> str:
    """One run, a line for each thing to know."""
    rows = [
        ("state", _state(status)),
        ("progress", _progress(status)),
        ("loss", _loss(status)),
        ("speed", _speed(status)),
        ("left", _left(status)),
        ("checkpoint", _checkpoint(status)),
        ("disk", _disk(status)),
        ("starts", _starts(status)),
        *(("", _restart(entry)) for entry in status.recent_restarts),
        ("excluded", ", ".join(status.excluded_nodes)),
        ("last error", status.error or ""),
    ]
    shown = [(name, text) for name, text in rows if text]
    return "\n".join([f"{status.recipe} ({status.folder})", *(f"{name:12}{text}" for name, text in shown)])


def _state(status: Status) -> str:
    parts = [status.state, status.state_reason]
    if status.state == "running" and status.silent_seconds is not None:
        parts.append(f"last write {duration(status.silent_seconds)} ago")
    if status.state in ("running", "starting", "probably dead") and status.job:
        parts.append(f"job {status.job}" + (f" on {len(status.nodes)} nodes" if status.nodes else ""))
    if status.state in ("failed", "interrupted") and status.exit_code is not None:
        parts.append(f"exit code {status.exit_code}")
    return "; ".join(filter(None, parts))


def _progress(status: Status) -> str:
    of = f" of {status.steps:,} ({status.percent:.1f}%)" if status.steps and status.percent is not None else ""
    return f"step {status.step:,}{of}" + (f", {amount(status.tokens)} tokens" if status.tokens else "")


def _loss(status: Status) -> str:
    parts = []
    if status.loss is not None:
        parts.append(f"{status.loss:.4f}")
    if status.loss_trend:
        parts.append(f"{status.loss_trend} ({status.loss_change:+.4f} within {status.loss_change_steps} steps)")
    if status.validation_loss is not None:
        parts.append(f"validation {status.validation_loss:.4f} at step {status.validation_step:,}")
    return ", ".join(parts)


def _speed(status: Status) -> str:
    if status.tokens_per_second is None or status.step_seconds is None:
        return ""
    mfu = f", MFU {status.mfu:.1%}" if status.mfu is not None else ""
    return f"{status.tokens_per_second:,.0f} tokens/s{mfu}, {status.step_seconds:.3g} s a step (medians of the last steps)"


def _left(status: Status) -> str:
    if status.left_seconds is None or status.state == "finished":
        return ""
    extra = []
    if status.overhead_seconds_per_step is not None:
        extra.append(f"{status.overhead_seconds_per_step:.2g} s of saves and validation")
    if status.restart_seconds_per_step:
        extra.append(f"{status.restart_seconds_per_step:.2g} s of restarts")
    once = "" if status.state == "running" else " once it runs"
    return f"{duration(status.left_seconds)}{once}" + (f" (a step carries {' and '.join(extra)}, as seen so far)" if extra else "")


def _checkpoint(status: Status) -> str:
    if status.checkpoint_step is None or status.checkpoint_age_seconds is None or status.checkpoint_bytes is None:
        return "none yet"
    least = "at least " if status.checkpoint_bytes_is_lower_bound else ""
    age = duration(status.checkpoint_age_seconds)
    return f"step {status.checkpoint_step:,}, {age} old, {least}{amount(status.checkpoint_bytes)}B"


def _disk(status: Status) -> str:
    if status.disk_free_bytes is None:
        return ""
    room = status.disk_free_bytes // status.checkpoint_bytes if status.checkpoint_bytes else None
    more = f", room for {room:,} more checkpoints" if room is not None and not status.checkpoint_bytes_is_lower_bound else ""
    return f"{amount(status.disk_free_bytes)}B free{more}"


def _starts(status: Status) -> str:
    lost = f", {duration(status.lost_hours * 3600)} lost between them" if status.lost_hours is not None and status.restarts else ""
    return f"{status.starts} ({status.restarts} of them restarts{lost})" if status.restarts else str(status.starts)


def _restart(entry: dict) -> str:
    when = time.strftime("%m-%d %H:%M", time.localtime(entry["unix_seconds"]))
    excluded = f"; excluded {', '.join(entry['excluded'])}" if entry["excluded"] else ""
    step = f"from step {entry['step']:,}" if isinstance(entry["step"], int) else "again"
    return f"{when} {step}: {entry['reason']}{excluded}"


def table(statuses: list[Status]) -> str:
    """Several runs, a row each."""
    rows = [("run", "state", "step", "%", "loss", "tokens/s", "MFU", "left", "saved", "restarts", "lost h", "last")]
    for status in statuses:
        rows.append(
            (
                status.recipe,
                status.state,
                f"{status.step:,}",
                "" if status.percent is None else f"{status.percent:.0f}",
                "" if status.loss is None else f"{status.loss:.4f}",
                "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
                "" if status.mfu is None else f"{status.mfu:.1%}",
                "" if status.left_seconds is None or status.state == "finished" else duration(status.left_seconds),
                "" if status.checkpoint_step is None else f"{status.checkpoint_step:,}",
                str(status.restarts),
                "" if status.lost_hours is None else f"{status.lost_hours:.1f}",
                "" if status.silent_seconds is None else f"{duration(status.silent_seconds)} ago",
            )
        )
    if len({status.recipe for status in statuses}) < len(statuses):  # one recipe several times: folders tell them apart
        rows = [rows[0], *((status.folder, *row[1:]) for status, row in zip(statuses, rows[1:], strict=True))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    words = "<<" + ">" * (len(widths) - 2)  # name and state to the left, numbers to the right
    return "\n".join("  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, words, widths, strict=True)) for row in rows)


def amount(number: float) -> str:
    """With a unit prefix of three digits: 1.07 G, 512 M, 30 k. Powers of ten."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "
