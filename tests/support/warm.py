"""Start the training commands without paying for their imports: as forks of a process that has torch and the engine loaded.

Importing an engine costs more than twenty steps of a tiny model. `Warm` is what the tests use of subprocess.Popen; the
command line, the environment, the two pipes, the process group and the exit code are those of a cold start, and so is the
interpreter's end. Cold starts stay where there is a GPU (a fork cannot use CUDA), and for all tests with ENDPROMPT_COLD=1.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from endprompt.training import launch

ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = Path(__file__).with_name("warm_server.py")
_servers: dict[str, bytes] = {}


def usable() -> bool:
    import torch

    return not torch.cuda.is_available() and not os.environ.get("ENDPROMPT_COLD")


def address_of(engine: str) -> bytes:
    """Where the server of "deepspeed" or "megatron" listens; the first call starts it, and it ends with this process."""
    if engine not in _servers:
        address = f"\0endprompt-{os.getpid()}-{engine}-{time.monotonic_ns()}".encode()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(address)
            listener.listen()
            command = [sys.executable, "-W", "ignore", str(SERVER), engine, str(listener.fileno())]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            server = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[listener.fileno()], start_new_session=True)
        atexit.register(lambda: (server.stdin.close(), server.wait()))
        _servers[engine] = address
    return _servers[engine]


def launch_ranks(engine: str, ranks: int, script: str, *arguments: object, cold: bool = False, **environment: str) -> int:
    """endprompt's own launcher with a script of tests/support, in the repository's root. Returns the exit code.

    cold: new interpreters, for measurements of memory: a fork shares pages with the server. environment: in addition.
    """
    command = [sys.executable, str(ROOT / "tests/support" / script), *map(str, arguments)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if usable() and not cold:
        popen = functools.partial(Warm, address_of(engine), cwd=ROOT, outputs=(1, 2))
    else:
        popen = functools.partial(subprocess.Popen, cwd=ROOT)
    patched = mock.patch.dict(os.environ, {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment})
    with patched, mock.patch.object(launch, "subprocess", SimpleNamespace(Popen=popen)):
        return launch.launch(ranks, command)


class Warm:
    """A process that the server at `address` forks to run `command` (python, script or -m module, arguments).

    group: the process group that it joins; its own by default, so that `os.killpg(pid, ...)` ends it with its ranks.
    outputs: file descriptors for stdout and stderr; pipes by default.
    """

    def __init__(self, address: bytes, command: list[str], *, cwd: Path, env: dict[str, str], group: int = 0, outputs=None):
        self.args, self.returncode = command, None
        self._files, ours = [], list(outputs or [])
        while len(self._files) + len(outputs or []) < 2:
            reading, writing = os.pipe()
            self._files.append(os.fdopen(reading))
            ours.append(writing)
        request = {"command": command, "cwd": str(cwd), "environment": env, "group": group, "address": address.decode()}
        with tempfile.TemporaryFile() as file:  # an environment may be longer than a packet
            file.write(json.dumps(request).encode())
            file.flush()
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect(address)
            socket.send_fds(self._socket, [b"start"], [file.fileno(), *ours])
            for descriptor in ours[len(outputs or []) :]:
                os.close(descriptor)
            self.pid = json.loads(self._socket.recv(100) or b"null")
        if self.pid is None:
            raise RuntimeError("the server of warm starts has ended; it says why on stderr")

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._socket.settimeout(timeout)
            try:
                status = self._socket.recv(100)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self.returncode = os.waitstatus_to_exitcode(int(status))
            self._socket.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Everything it and what it has started write, until all of them are gone."""
        found, deadline = ["", ""], None if timeout is None else time.monotonic() + timeout

        def read(number: int) -> None:
            with self._files[number] as file:
                found[number] = file.read()

        readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(2)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(None if deadline is None else max(0, deadline - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if deadline is None else max(0.01, deadline - time.monotonic()))
        return found[0], found[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
