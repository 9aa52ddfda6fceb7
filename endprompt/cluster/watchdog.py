"""Notice a run that hangs: alive, on all its GPUs, and writing nothing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

PATTERNS = ("log.jsonl", "status.json", "checkpoints/*", "checkpoints/*/*", "checkpoints/*/*/*", "export/*", ".export*/*", "attempts/*/*")
"""What a live run writes: a log line a step (or every log_interval), files of a checkpoint or of an export between."""


def signs_of_life(run: Path) -> dict[str, tuple[int, int]]:
    """(time of the last write in ns, size in bytes) of every file that a live run touches, by path."""
    found = {}
    for pattern in PATTERNS:
        with contextlib.suppress(OSError):  # renamed while it is listed, or a file server's hiccup: the next look tells more
            for path in run.glob(pattern):
                with contextlib.suppress(OSError):
                    state = path.stat()
                    found[str(path)] = (state.st_mtime_ns, state.st_size)
    return found


def watch(run: Path, timeout: float, *, pause: Callable[[float], None] = time.sleep, now: Callable[[], float] = time.monotonic) -> str:
    """Return, with the reason, once nothing has changed in the run folder for `timeout` seconds.

    Counted on this machine's clock from one change to the next: the file server's may differ from it.
    """
    seen, since = signs_of_life(run), now()
    while True:
        pause(min(10.0, timeout / 10))
        signs = signs_of_life(run)
        if signs != seen:
            seen, since = signs, now()
        if now() - since > timeout:
            return f"nothing written in {run} for {timeout:.0f} s (HANG_TIMEOUT)"
