"""Outputs appear whole or not at all: written under a temporary name beside the target, synced, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from endprompt.errors import UserError


def sync_path(path: Path) -> None:
    """Flush a file or a folder: after a power cut a renamed folder must not hold empty files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary sibling of `path` for writing; rename it over `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # write() and fsync() do not say which file found the disk full
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused: it is not JSON and most readers fail on it."""
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_file(path) as file:
        file.write(text + "\n")


@contextmanager
def atomic_directory(path: str | Path, *, fix: str = "choose another output folder or remove this one") -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes `path` when the block ends without an error.

    Raises UserError when `path` already holds something: finished output is never overwritten.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise UserError(path, "exists already", fix)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)
        sync_path(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
