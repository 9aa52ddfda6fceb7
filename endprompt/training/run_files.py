"""Read the files of a run folder while the run writes them, perhaps over a slow network file system.

Standard library and PyYAML only: a login node answers in a fraction of a second. Few file system calls, and a file that
goes away or is replaced between two of them is ordinary.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml

from endprompt.errors import UserError

SIZING_SECONDS = 0.3
"""A checkpoint of many ranks on a slow file system: after this long its size is given as a lower bound."""

WORTH_A_LOOK = 200
"""Entries of an unfinished checkpoint whose times are looked at: the newest of some says enough."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint. written: Unix time. whole_size: False when `size` (bytes) is a lower bound."""

    step: int
    written: float
    size: int
    whole_size: bool


def read_bytes(path: Path) -> bytes | None:
    """The file's bytes, None where there is none."""
    for attempt in range(3):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == 2:  # NFS: replaced between open and read
                raise
    return None


def read_status(folder: Path) -> dict:
    """status.json, {} before the first start. Raises UserError on a damaged one."""
    return _mapping(
        folder / "status.json", json.loads, "holds no JSON object", "remove it; the checkpoints decide where the run goes on"
    )  # fmt: skip


def read_recipe(folder: Path) -> dict:
    """recipe.yaml as plain values, {} before the first start. Raises UserError on a damaged one."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return _mapping(
        folder / "recipe.yaml", lambda text: yaml.load(text, Loader=loader), "is not YAML with fields",
        "the next start writes it again; until then remove it",
    )  # fmt: skip


def _mapping(path: Path, parse: Callable[[bytes], object], problem: str, fix: str) -> dict:
    text = read_bytes(path)
    if text is None:
        return {}
    try:
        return dict(parse(text))
    except (yaml.YAMLError, ValueError, TypeError):
        raise UserError(path, problem, fix) from None


def read_lines(path: Path, needs: dict[str, type | tuple[type, ...]]) -> list[dict]:
    """The objects of a JSONL file, [] where there is none. needs: fields that each must have, and their types.

    A torn last line is being written and is left out. Raises UserError that names the line on any other damage.
    """
    lines = (read_bytes(path) or b"").split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError
        except ValueError:  # UnicodeDecodeError is one
            # Without its newline it is half written; NUL bytes are pages that another client of NFS has not sent yet.
            if number == len(lines) or (number == len(lines) - 1 and b"\0" in line):
                break
            raise UserError(f"{path}, line {number}", "is not a JSON object", "remove this line") from None
        for name, kind in needs.items():
            value = entry.get(name)
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:  # the last one is NaN
                raise UserError(f"{path}, line {number}", f"has {name} {value!r}", "remove this line")
        found.append(entry)
    return found


def modified(path: Path) -> float | None:
    """Unix time of the last write, None for what is not there (any more)."""
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def unix_time(stamp: object) -> float | None:
    """Unix time of status.json's `updated`, None for anything else."""
    with contextlib.suppress(ValueError, TypeError):
        return datetime.fromisoformat(stamp).timestamp()
    return None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint that a resume would take: the one that `latest` names, when it is whole."""
    found = _named_by_pointer(folder)
    written = modified(found[1] / "state.json") if found else None
    return None if found is None or written is None else Checkpoint(found[0], written, *_size(found[1]))


def checkpoint_step(folder: Path) -> int:
    """Step of the checkpoint that a resume would take, 0 where there is none."""
    found = _named_by_pointer(folder)
    return found[0] if found and modified(found[1] / "state.json") is not None else 0


def _named_by_pointer(folder: Path) -> tuple[int, Path] | None:
    """(step, folder) of what checkpoints/latest names."""
    name = (read_bytes(folder / "checkpoints" / "latest") or b"").decode(errors="replace").strip()
    try:
        return int(name.removeprefix("step_")), folder / "checkpoints" / name
    except ValueError:
        return None


def _size(path: Path) -> tuple[int, bool]:
    """(bytes, whether that is all) of a folder."""
    total, folders, stop = 0, [path], time.monotonic() + SIZING_SECONDS
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:  # an old checkpoint may be going away
            for entry in entries:
                if time.monotonic() > stop:
                    return total, False
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total, True


def newest_unfinished_write(folder: Path) -> float | None:
    """Unix time of the last write into a checkpoint that is being saved or converted, None where there is none."""
    times = []
    with contextlib.suppress(OSError):
        for path in (folder / "checkpoints").iterdir():
            if path.suffix == ".incomplete" or ".universal" in path.name:
                times += _times(path)
    return max(times, default=None)


def _times(path: Path) -> list[float]:
    found, folders = [], [path]
    while folders and len(found) < WORTH_A_LOOK:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                found.append(entry.stat(follow_symlinks=False).st_mtime)
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                if len(found) >= WORTH_A_LOOK:
                    break
    return found + [at for at in [modified(path)] if at is not None]


def disk_free(folder: Path) -> int | None:
    """Bytes, None where the file system does not say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
