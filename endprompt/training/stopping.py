"""Ask a running job to save and stop: SIGUSR1 or SIGTERM (what SLURM sends before it kills), or a file named STOP."""

from __future__ import annotations

import signal
from pathlib import Path


class StopRequests:
    """Remembers that somebody asked to stop; the loop looks once a step, all ranks together.

    A handler only sets a flag: saving inside it could interrupt a collective or an earlier save.
    """

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._signal: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """The signal's name, `STOP file`, or None."""
        if self._signal is None and self._stop_file.exists():
            return "STOP file"
        return self._signal
