"""One way to tell a user what is wrong: one line that names the place, the problem and the fix, and exit code 2."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

EXIT_BAD_INPUT = 2
"""The command could not start or go on because of something the user can mend."""

EXIT_INTERRUPTED = 75
"""Training saved a checkpoint and stopped because it was asked to (signal or stop file): run the same command again.

75 is EX_TEMPFAIL of sysexits.h, which no Python crash (1), signal death (128 + n) or bad input (2) produces.
"""


class UserError(Exception):
    """Something that the user can mend. `str()` gives the whole line: where, what, and what to do.

    where: the file, and the field or line in it, for instance `recipes/a.yaml: rope.factor`.
    problem: what is wrong there, with the value found.
    fix: what to do about it, as an instruction.
    """

    def __init__(self, where: object, problem: str, fix: str):
        self.where, self.problem, self.fix = str(where), problem, fix
        super().__init__(" ".join(f"{where}: {problem}; {fix}".split()))

    exit_code = EXIT_BAD_INPUT

    def __reduce__(self):  # exceptions cross process pools by pickling, which would call __init__ with one argument
        return UserError, (self.where, self.problem, self.fix)


class MachineError(UserError):
    """One line like a UserError, of something that may pass by itself: a file server's hiccup, a connection that broke.

    Its exit code is a crash's: a launcher tries again, where bad input would end the run for good.
    """

    exit_code = 1

    def __reduce__(self):
        return MachineError, (self.where, self.problem, self.fix)


PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH,
    errno.EHOSTUNREACH, errno.EREMOTEIO, errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.EBUSY,
}  # fmt: skip
"""Refusals of the operating system that another attempt may not meet."""


def from_os_error(error: OSError) -> UserError:
    """Words for the operating system's refusals that a user meets: full disk, no permission, missing file."""
    where = error.filename or "file system"
    fixes = {
        errno.ENOSPC: "free disk space or choose another output folder, then run the same command again",
        errno.EDQUOT: "free disk quota or choose another output folder, then run the same command again",
        errno.EACCES: "give yourself permission or choose another path",
        errno.EPERM: "give yourself permission or choose another path",
        errno.EROFS: "choose a path that can be written",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a folder was expected on this path; check the path",
        errno.EISDIR: "a file was expected here, not a folder; check the path",
    }
    problem = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in PASSING:
        return MachineError(where, problem, "run the same command again; if it comes back, look at the disk or the file server")
    return UserError(where, problem, fixes.get(error.errno, "check the path"))


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's `main` and exit: 0 or its return value, 2 with one line for bad input, 130 on Ctrl-C.

    Under a launcher every rank meets the same UserError and only rank 0 prints it. A bare OSError is a rank's own: shared
    ones come out of `World` as UserErrors.
    """
    try:
        code = main()
    except BrokenPipeError:  # the reader of our output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (UserError, OSError) as problem:
        if isinstance(problem, OSError) and problem.errno is None:
            raise  # not the operating system's refusal but a library's own failure: a traceback is what helps
        error = problem if isinstance(problem, UserError) else from_os_error(problem)
        if isinstance(problem, OSError) or int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = 130
    sys.exit(code or 0)
