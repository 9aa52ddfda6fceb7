"""Ask a running job to save and stop: SIGUSR1 or SIGTERM (what SLURM sends before it kills), or a file named STOP."""

from __future__ import annotations

import signal
import threading
from pathlib import Path


class StopRequests:
    """Remembers that somebody asked to stop; the loop looks once a step, all ranks together.

    A handler only sets a flag: saving inside it could interrupt a collective or an earlier save.

    SLURM sends SIGUSR1 to every process of a step, so also to the helpers of a checkpoint writer, which would die of it
    in the middle of the save that the signal asks for. A blocked signal is inherited blocked, whereas a handler is lost
    at exec: so SIGUSR1 is blocked here and a thread waits for it. SIGTERM is left to kill helpers, since scancel and
    `Process.terminate` mean it so.
    """

    def __init__(self, stop_file: Path):
        self._stop_file = stop_file
        self._signal: str | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            # SIGUSR1 too: threads that are older than the block still receive it, and a launcher may have had it ignored,
            # which would drop it before anybody waits.
            signal.signal(number, self._remember)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        threading.Thread(target=self._await_usr1, name="wait for SIGUSR1", daemon=True).start()

    def _remember(self, number: int, frame) -> None:
        self._signal = signal.Signals(number).name

    def _await_usr1(self) -> None:
        while True:
            self._remember(signal.sigwait({signal.SIGUSR1}), None)

    @property
    def reason(self) -> str | None:
        """The signal's name, `STOP file`, or None."""
        if self._signal is None and self._stop_file.exists():
            return "STOP file"
        return self._signal
