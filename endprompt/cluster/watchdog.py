"""Notice a run that hangs: alive, on all its GPUs, and writing nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

PATTERNS = ("log.jsonl", "status.json", "checkpoints/*", "checkpoints/*/*", "checkpoints/*/*/*", "export/*", ".export*/*", "attempts/*/*")
"""What a live run writes: a log line a step (or every log_interval), files of a checkpoint or of an export between."""


def newest_sign_of_life(run: Path) -> float:
    """Time of the last write in the run folder, in seconds since the epoch; 0 for an empty one."""
    newest = 0.0
    for pattern in PATTERNS:
        with contextlib.suppress(FileNotFoundError):  # a folder that is renamed while it is listed
            for path in run.glob(pattern):
                with contextlib.suppress(FileNotFoundError):
                    newest = max(newest, path.stat().st_mtime)
    return newest


def watch(
    run: Path, timeout: float, *, pause: Callable[[float], None] = time.sleep, now: Callable[[], float] = time.monotonic
) -> str:
    """Return, with the reason, once the run has written nothing for `timeout` seconds.

    Counted on this machine's clock from one change to the next: the file server's may differ from it.
    """
    seen, since = newest_sign_of_life(run), now()
    while True:
        pause(min(10.0, timeout / 10))
        newest = newest_sign_of_life(run)
        if newest != seen:
            seen, since = newest, now()
        if now() - since > timeout:
            return f"nothing written in {run} for {timeout:.0f} s (HANG_TIMEOUT)"
