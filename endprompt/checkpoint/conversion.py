"""Carry out a conversion: tasks over threads, a journal to resume from, a progress bar, and an output that appears whole.

The output grows in `.NAME.partial` beside the target; `.NAME.journal` says which tensors in it are on the disk, and with
what digest. When all are there the folder is renamed, so the target is absent or complete whenever the process dies.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from endprompt.atomic import sync_path
from endprompt.errors import UserError

SYNC_BYTES = 256 * 2**20
"""Finished tensors are made durable and entered in the journal together, every so many bytes: a kill repeats at most these."""


@dataclass(frozen=True)
class Task:
    """Writes one tensor. key: unique and the same at every start. size: bytes, for the bar. work: returns facts for the journal."""

    key: str
    size: int
    work: Callable[[Files], dict[str, Any]]


@dataclass
class Files:
    """The output files by name, opened once; `write` may be called from any thread, for places that do not overlap."""

    folder: Path
    progress: Callable[[int], None]
    _descriptors: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                self._descriptors[name] = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o666)
            return self._descriptors[name]

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        view, descriptor = memoryview(data), self.descriptor(name)
        try:
            while len(view):
                count = os.pwrite(descriptor, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            error.filename = error.filename or str(self.folder / name)
            raise

    def sync(self) -> None:
        with self._lock:
            descriptors = dict(self._descriptors)
        for name, descriptor in descriptors.items():
            try:
                os.fdatasync(descriptor)
            except OSError as error:
                error.filename = error.filename or str(self.folder / name)
                raise

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


@dataclass(frozen=True)
class Conversion:
    """target: the folder to make. identity: what must be the same for a resume. tasks: in the order of the output.
    finish: called with the partial folder and {task key: facts} when every tensor is there, to write the small files.
    subfolder: of the target, where the files of the tasks lie; empty for the target itself."""

    target: Path
    identity: dict[str, Any]
    tasks: list[Task]
    finish: Callable[[Path, dict[str, dict]], None]
    subfolder: str = ""

    @property
    def size(self) -> int:
        return sum(task.size for task in self.tasks)


def default_workers() -> int:
    """Threads: waiting for the disk is most of the work, so a few more than cores; memory is a small buffer each."""
    return max(2, min(8, len(os.sched_getaffinity(0)) + 1))


def partial_paths(target: Path) -> tuple[Path, Path]:
    """(folder that grows, journal) of a target."""
    return target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.journal")


def check_target(target: Path, resume: bool) -> bool:
    """Refuse a target that holds something. True where it is complete already and --resume asks to finish it."""
    _, journal = partial_paths(target)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        if resume and journal.is_file():  # killed between the rename and the removal of the journal
            journal.unlink()
            return True
        raise UserError(target, "exists already", "choose another --output or remove it")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(parent, "is not a folder", "choose another --output")
    return False


def run(conversion: Conversion, *, workers: int, resume: bool, quiet: bool = False) -> None:
    """Do it. Raises UserError: target exists, too little disk, another conversion at work, nothing to resume that fits."""
    target = conversion.target
    partial, journal_path = partial_paths(target)
    identity = hashlib.sha256(json.dumps(conversion.identity, sort_keys=True).encode()).hexdigest()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(journal_path) as journal:
        done = _read_journal(journal, identity, journal_path) if resume and partial.is_dir() else {}
        try:
            if not done:
                shutil.rmtree(partial, ignore_errors=True)
            _check_disk(conversion, partial, target)
            (partial / conversion.subfolder).mkdir(parents=True, exist_ok=True)
            if not done:
                _begin_journal(journal, identity)
            _run_tasks(conversion, partial / conversion.subfolder, journal, done, workers, quiet)
            for stray in partial.rglob(".*.tmp"):  # of a process that died in here before
                stray.unlink()
            conversion.finish(partial, done)
        except UserError:
            _discard(partial, journal_path, keep=bool(done))
            raise
        for path in [*partial.rglob("*"), partial]:
            sync_path(path)
        if target.is_dir():
            target.rmdir()
        os.rename(partial, target)
        sync_path(target.parent)
        journal_path.unlink()


def _run_tasks(conversion: Conversion, folder: Path, journal, done: dict[str, dict], workers: int, quiet: bool) -> None:
    bar = tqdm(
        total=conversion.size, initial=sum(task.size for task in conversion.tasks if task.key in done), unit="B", unit_scale=True,
        desc=conversion.target.name, disable=True if quiet else None,
    )  # fmt: skip
    lock = threading.Lock()

    def progress(count: int) -> None:
        with lock:
            bar.update(count)

    files = Files(folder, progress)
    written: dict[str, dict] = {}  # not yet durable

    def make_durable() -> None:
        files.sync()
        journal.writelines(json.dumps({"task": key, "facts": facts}) + "\n" for key, facts in written.items())
        journal.flush()
        os.fsync(journal.fileno())
        done.update(written)
        written.clear()

    waiting = iter([task for task in conversion.tasks if task.key not in done])
    running: dict[Future, Task] = {}
    unsynced = 0
    with bar, ThreadPoolExecutor(workers) as pool:
        try:
            while True:
                # Twice the workers: they go on while this thread waits for the disk.
                while len(running) < 2 * workers and (task := next(waiting, None)):
                    running[pool.submit(task.work, files)] = task
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    written[task.key] = future.result()
                    unsynced += task.size
                if unsynced >= SYNC_BYTES:
                    make_durable()
                    unsynced = 0
            make_durable()
        finally:
            for future in running:
                future.cancel()
            wait(running)
            files.close()


def _discard(partial: Path, journal: Path, keep: bool) -> None:
    """Nothing half-written stays of a conversion that cannot go on; one that had been resumed keeps what it had."""
    if not keep:
        shutil.rmtree(partial, ignore_errors=True)
        journal.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[Any]:
    """The journal, open for appending, held by this process alone as long as it lives."""
    with open(path, "a+") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(path, "another conversion to this output is running", "wait for it or choose another --output") from None
            print("note: the output's file system has no locks; start no second conversion to it", flush=True)
        yield journal


def _begin_journal(journal, identity: str) -> None:
    journal.seek(0)
    journal.truncate()
    journal.write(json.dumps({"identity": identity}) + "\n")
    journal.flush()
    os.fsync(journal.fileno())


def _read_journal(journal, identity: str, path: Path) -> dict[str, dict]:
    """{task key: facts} of what is on the disk; {} for a journal that had not begun. Raises UserError for another job's."""
    journal.seek(0)
    content, lines = journal.read(), []
    if content and not content.endswith("\n"):
        journal.write("\n")  # ends a line that a kill tore, so that the next one stands alone
    for line in content.split("\n"):
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    if not lines:
        return {}
    if lines[0] != {"identity": identity}:
        raise UserError(path, "belongs to a conversion of another source or with other options", "run without --resume to start again")
    return {entry["task"]: entry["facts"] for entry in lines[1:]}


def _check_disk(conversion: Conversion, partial: Path, target: Path) -> None:
    """2 % and 64 MB above the tensors: headers, tokenizer, file system overhead. What lies in the partial folder counts."""
    there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    needed, free = 1.02 * conversion.size + 64e6 - there, shutil.disk_usage(target.parent).free
    if free < needed:
        raise UserError(
            target, f"needs {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free", "free disk space or choose another --output"
        )
