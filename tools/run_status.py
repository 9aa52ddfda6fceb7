#!/usr/bin/env python3
"""How runs are doing, from their folders alone: state, progress, loss, speed, time left, checkpoint, disk, restarts, errors.

    python tools/run_status.py runs/llama3_70b_128k
    python tools/run_status.py runs/* --watch 30          # a table, again every 30 seconds
    python tools/run_status.py runs/llama3_70b_128k --json

Needs no GPU and no torch, and only reads: it may run on a login node while the run goes on elsewhere. Exit code 2 when one
of the folders is no run or holds a damaged file, which is then named.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import time

from endprompt.cluster.status import Status, read
from endprompt.cluster.status_text import block, table
from endprompt.errors import EXIT_BAD_INPUT, UserError, from_os_error, run_command


def main() -> int:
    arguments = parse_arguments()
    if arguments.watch is None:
        return show(arguments.folders, arguments.json)
    try:
        while True:
            if sys.stdout.isatty() and not arguments.json:
                print("\033[2J\033[H", end="")  # clear, cursor to the top
            show(arguments.folders, arguments.json)
            sys.stdout.flush()
            time.sleep(arguments.watch)
    except KeyboardInterrupt:  # the way to end it
        return 0


def show(folders: list[Path], as_json: bool) -> int:
    """Print what can be read, then a line for each folder that cannot. Returns the exit code."""
    found: list[Status] = []
    errors: dict[Path, str] = {}
    for folder in folders:
        try:
            found.append(read(folder))
        except (UserError, OSError) as problem:
            errors[folder] = str(problem if isinstance(problem, UserError) else from_os_error(problem))
    if as_json and len(folders) == 1 and found:
        print(json.dumps(found[0].as_dict(), allow_nan=False))
    elif as_json and len(folders) > 1:
        failed = [{"folder": str(folder), "error": error} for folder, error in errors.items()]
        print(json.dumps([status.as_dict() for status in found] + failed, allow_nan=False))
    elif found:
        print(block(found[0]) if len(folders) == 1 else table(found))
    for error in errors.values():
        print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT if errors else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="output.directory of a recipe")
    parser.add_argument("--json", action="store_true", help="one object, or a list for several folders; units are in the names")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="show it again every SECONDS until Ctrl-C")
    arguments = parser.parse_args()
    if arguments.watch is not None and not arguments.watch > 0:
        raise UserError("--watch", f"is {arguments.watch}", "give a number of seconds above 0")
    return arguments


if __name__ == "__main__":
    run_command(main)
