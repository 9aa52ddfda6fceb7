"""How commands end: one line and a code."""

import errno
import pickle
import subprocess
import sys

import pytest

from endprompt.errors import MachineError, UserError, from_os_error, run_command


def ending(main, capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    return stopped.value.code, capsys.readouterr().err


def failing(error):
    def main():
        raise error

    return main


def test_codes(capsys, monkeypatch):
    assert ending(lambda: None, capsys) == (0, "")
    assert ending(lambda: 75, capsys) == (75, "")
    assert ending(failing(UserError("a.yaml: x", "is\nwrong", "mend it")), capsys) == (2, "error: a.yaml: x: is wrong; mend it\n")
    code, line = ending(failing(PermissionError(errno.EACCES, "Permission denied", "/somewhere")), capsys)
    assert code == 2 and line.startswith("error: /somewhere: Permission denied; ")
    assert ending(failing(KeyboardInterrupt()), capsys)[0] == 130


def test_other_failures_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 / 0)


def test_only_rank_0_speaks_unless_a_rank_has_an_error_of_its_own(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ending(failing(UserError("a", "b", "c")), capsys) == (2, "")
    code, line = ending(failing(OSError(errno.ENOSPC, "No space left on device", "/somewhere")), capsys)
    assert code == 2 and line.startswith("error: /somewhere: ")


def test_errors_survive_process_boundaries():
    copy = pickle.loads(pickle.dumps(UserError("where", "what", "how")))
    assert (copy.where, copy.problem, copy.fix, str(copy)) == ("where", "what", "how", "where: what; how")


def test_a_reader_that_leaves_early_is_no_error():
    code = "from endprompt.errors import run_command\nrun_command(lambda: [print('x' * 1000, flush=True) for _ in range(1000)] and None)"
    finished = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$0" | head -1; exit ${{PIPESTATUS[0]}}', code], capture_output=True, text=True
    )
    assert finished.returncode == 141 and finished.stderr == ""


def test_what_may_pass_by_itself_is_a_crash_to_a_launcher(capsys):
    """A file server's hiccup must not look like bad input, which no launcher tries again."""

    def hiccup():
        raise OSError(errno.ESTALE, "Stale file handle", "runs/log.jsonl")

    with pytest.raises(SystemExit) as exit_:
        run_command(hiccup)
    assert exit_.value.code == 1 and capsys.readouterr().err.startswith("error: runs/log.jsonl: ")
    error = from_os_error(OSError(errno.EIO, "Input/output error", "x"))
    assert isinstance(error, MachineError) and type(pickle.loads(pickle.dumps(error))) is MachineError
    assert from_os_error(OSError(errno.ENOSPC, "full", "x")).exit_code == 2
