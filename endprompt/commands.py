"""Run this repository's own commands from another one, showing them so that the user can repeat each by hand."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

from endprompt.errors import EXIT_INTERRUPTED, UserError

ROOT = Path(__file__).resolve().parent.parent


def run_step(command: list[str], *, what: str, shown: str | None = None) -> None:
    """Echo and run a command of this repository. Raises UserError when it fails, after its own message.

    shown: a shorter way to write the same command, where it names hundreds of files.
    """
    print(f"\n$ {shown or shlex.join(command).replace(sys.executable, 'python').replace(f'{ROOT}/', '')}", flush=True)
    code = subprocess.run(command).returncode
    if code == EXIT_INTERRUPTED:
        raise UserError(what, "was asked to stop and has saved", "run the same command again to go on")
    if code:
        raise UserError(what, f"failed with exit code {code}", "see its message above, then run the same command again")
