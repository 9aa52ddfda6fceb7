"""A process that has an engine imported and nothing initialised, and forks itself for every start that `warm.Warm` asks for.

warm_server.py ENGINE DESCRIPTOR        ENGINE: deepspeed or megatron; DESCRIPTOR: the listening socket. Ends with its stdin.

Top-level imports are the standard library's only: helpers that a checkpoint writer spawns import this file again.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

MODULES = {
    "deepspeed": [
        "transformers", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto",
        "transformers.models.llama.modeling_llama", "deepspeed", "deepspeed.ops", "endprompt.training.lifecycle",
        *(f"endprompt.zero3.{name}" for name in ("checkpoints", "engine", "export", "load", "loop", "prepare", "probe")), "ds_train",
    ],
    "megatron": [
        "megatron.core", "transformers.models.auto.tokenization_auto", "endprompt.training.lifecycle",
        *(f"megatron_patches.{name}" for name in ("checkpoints", "engine", "load", "loop", "model", "prepare", "probe", "train")),
    ],
}  # fmt: skip


def main() -> None:
    engine, listener = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as endprompt/zero3/backend.py
    if engine == "megatron":
        from megatron_patches import cpu_backend

        cpu_backend.stand_in_for_triton()
    for name in MODULES[engine]:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a fork copies one thread only"
    gc.collect()
    gc.freeze()
    run(serve(listener))


def serve(listener: socket.socket) -> dict:
    """Fork for every request until stdin ends. Returns the request, in the forked process only."""
    waiting, running = selectors.DefaultSelector(), {}
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(0, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fileobj == 0:
                end(running)
            elif key.fileobj is not listener:
                connection, pid = running.pop(key.fileobj)
                waiting.unregister(key.fileobj)
                os.close(key.fileobj)
                with contextlib.suppress(OSError):  # nobody waits for it any more
                    connection.send(str(os.waitpid(pid, 0)[1]).encode())
                connection.close()
            else:
                connection, _ = listener.accept()
                _, descriptors, _, _ = socket.recv_fds(connection, 100, 3)
                with open(descriptors[0], "rb") as file:
                    file.seek(0)
                    request = json.load(file)
                if (pid := os.fork()) == 0:
                    for open_one in (waiting, listener, connection, *(other for other, _ in running.values())):
                        open_one.close()
                    for pidfd in running:
                        os.close(pidfd)
                    become(request, *descriptors[1:])
                    return request
                for descriptor in descriptors[1:]:
                    os.close(descriptor)
                with contextlib.suppress(OSError):  # as the child does: whoever hears of the pid may signal the group
                    os.setpgid(pid, request["group"])
                pidfd = os.pidfd_open(pid)
                running[pidfd] = (connection, pid)
                waiting.register(pidfd, selectors.EVENT_READ)
                connection.send(str(pid).encode())


def end(running: dict) -> None:
    for _, pid in running.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    os._exit(0)


def become(request: dict, stdout: int, stderr: int) -> None:
    """Place in the process group, folder, environment and outputs that a cold start would have."""
    os.setpgid(0, request["group"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    for mine, fixed in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(mine, fixed)
        os.close(mine)


def run(request: dict) -> None:
    from endprompt.errors import run_command
    from endprompt.training import launch

    words = request["command"][1:]
    while words[0] == "-W":
        words = words[2:]
    if words[0] == "-m":
        name, sys.argv = words[1], words[1:]
    else:
        name, sys.argv = ".".join(Path(words[0]).resolve().relative_to(ROOT).with_suffix("").parts), words
    from tests.support.warm import Warm

    # Ranks are forks of the server, too, in the group of their launcher.
    start = functools.partial(Warm, request["address"].encode(), cwd=Path.cwd(), group=os.getpgrp(), outputs=(1, 2))
    launch.subprocess = SimpleNamespace(Popen=start)
    run_command(importlib.import_module(name).main)


if __name__ == "__main__":
    main()
