"""What the two conversion commands share: arguments, the dry run and the last line."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from endprompt.checkpoint.conversion import Conversion, check_target, default_workers, run
from endprompt.errors import UserError

_PROBE_BYTES = 2**28


def add_common_arguments(parser: argparse.ArgumentParser, input_help: str) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="DIR", help=input_help)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--resume", action="store_true", help="go on where a killed conversion stopped")
    parser.add_argument("--workers", type=int, default=default_workers(), metavar="N", help="threads (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="check the input; say what disk, memory and time it takes; write nothing")


def convert(arguments: argparse.Namespace, plan: Callable[[], Conversion]) -> None:
    """Plan, and unless it is a dry run convert, saying what was done. Raises UserError."""
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}", "is below 1", "give a positive number or leave it out")
    if arguments.output.resolve().is_relative_to(arguments.input.resolve()):
        raise UserError(f"--output {arguments.output}", "lies in --input", "choose a folder outside it")
    if check_target(arguments.output, arguments.resume):
        print(f"{arguments.output} is complete already")
        return
    conversion = plan()
    memory = 0.35 + 0.01 * arguments.workers  # GB: Python with torch, and a 1 MB block or two, with their casts, a thread
    print(f"{len(conversion.tasks)} tensors, {conversion.size / 1e9:.2f} GB of disk, under {memory:.1f} GB of memory", flush=True)
    if arguments.dry_run:
        speed = _disk_speed(arguments.output)
        seconds = conversion.size / speed
        print(f"about {seconds / 60:.1f} minutes at the {speed / 1e6:.0f} MB/s that the output's disk wrote just now")
        return
    began = time.monotonic()
    run(conversion, workers=arguments.workers, resume=arguments.resume)
    seconds = time.monotonic() - began
    print(f"{arguments.output}: written in {seconds:.1f} s ({conversion.size / seconds / 1e6:.0f} MB/s)")


def _disk_speed(target: Path) -> float:
    """Bytes a second of writing and syncing a scratch file beside the target. The source is assumed to read at least as fast."""
    folder = target.parent
    while not folder.is_dir():
        folder = folder.parent
    path = folder / f".{target.name}.{os.getpid()}.tmp"
    block = os.urandom(2**22)
    try:
        began = time.monotonic()
        with open(path, "wb") as file:
            for _ in range(_PROBE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _PROBE_BYTES / (time.monotonic() - began)
    finally:
        path.unlink(missing_ok=True)
