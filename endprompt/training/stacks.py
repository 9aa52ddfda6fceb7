"""Where every rank stands when a run hangs: each writes its stacks on request, and they are summed up.

Of 128 ranks that wait in a collective for one that does not come, the one is what matters: it stands elsewhere, or does not
answer at all. Python's faulthandler writes from the signal handler itself, so it also answers for a rank that waits in C++.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import signal
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from endprompt.words import ranges

FOLDER_VARIABLE = "ENDPROMPT_STACKS"
"""Of the environment: the folder for the ranks' files; without it they write to stderr."""

_FILE = re.compile(r"rank-(\d+)-(.*)\.txt")
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
_PROJECT = Path(__file__).resolve().parents[2]
_OWN = ("endprompt/", "megatron_patches/", "ds_train.py:")
_DECORATORS = ("wrapped_fn", "wrapper", "inner", "decorate_context", "_fn")  # DeepSpeed's and torch's; the next frame says more
_MAIN = ("<module>", "_run_module_as_main")  # where a process's first thread begins


def write_stacks_on_request() -> None:
    """From now on SIGUSR2 makes this process write the stack of each of its threads, and changes nothing else.

    To $ENDPROMPT_STACKS/rank-RANK-NODE.txt, made here and empty until asked: a rank that has been asked and left it empty is
    stopped, or waits in the kernel. To stderr where the variable is not set or its folder cannot be written.
    """
    stream = sys.stderr
    if folder := os.environ.get(FOLDER_VARIABLE):
        name = f"rank-{os.environ.get('RANK', 0)}-{os.environ.get('SLURMD_NODENAME', 'here')}.txt"
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            stream = open(Path(folder) / name, "w")  # noqa: SIM115 - open as long as the process: a handler can open nothing
        except OSError as error:  # no reason to end a run that may never hang
            print(f"note: {folder}: {error.strerror}: stacks would go to stderr", file=sys.stderr)
    faulthandler.register(signal.SIGUSR2, file=stream, all_threads=True)
    # A forked helper would write into the rank's file. It does again what was done before: ignore it, under slurm/lib/rank.sh.
    os.register_at_fork(after_in_child=lambda: faulthandler.unregister(signal.SIGUSR2))


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove those in which no rank has written: an attempt that did not hang leaves an empty file of each rank."""
    with contextlib.suppress(OSError):  # a file server's hiccup: they are in nobody's way
        for folder in folders:
            files = list(folder.iterdir())
            if not any(file.read_bytes() for file in files):  # read: a size may be an old one, from a network file system's cache
                for file in files:
                    file.unlink()
                folder.rmdir()


@dataclass(frozen=True)
class Standing:
    """One rank's answer. frames: of its main thread, innermost first, "function (file:line)"; none: it did not answer."""

    rank: int
    node: str
    frames: tuple[str, ...]

    @property
    def place(self) -> str:
        """The innermost frame that says something, and the innermost of this repository's own code."""
        telling = next((frame for frame in self.frames if frame.split()[0] not in _DECORATORS), self.frames[0])
        own = next((frame for frame in self.frames if any(f"({file}" in frame for file in _OWN)), telling)
        return telling if own == telling else f"{telling}, called from {own}"


def read_stacks(folder: Path) -> list[Standing]:
    """Of every rank that had begun to listen, by rank."""
    found = []
    for file in folder.glob("rank-*.txt"):
        if name := _FILE.fullmatch(file.name):
            try:
                frames = _main_thread(file.read_text(errors="replace"))
            except OSError:
                continue
            found.append(Standing(int(name[1]), name[2], tuple(map(_words, frames))))
    return sorted(found, key=lambda standing: standing.rank)


def silent_ranks(standings: Sequence[Standing]) -> list[Standing]:
    """Ranks that did not answer where others did; none where nobody did, for then they were not asked."""
    without = [standing for standing in standings if not standing.frames]
    return without if len(without) < len(standings) else []


def summary(standings: list[Standing], ranks: int) -> list[str]:
    """Lines for the log: ranks that stand at one place together, the fewest first, for they are what the others wait for."""
    if not any(standing.frames for standing in standings):
        return ["no rank answered"]
    lines = [f"{standing.node}: rank {standing.rank} does not answer" for standing in silent_ranks(standings)]
    places = defaultdict(list)
    for standing in standings:
        if standing.frames:
            places[standing.place].append(standing.rank)
    for place, together in sorted(places.items(), key=lambda item: len(item[1])):
        lines.append(f"{place}: rank{'s' if len(together) > 1 else ''} {ranges(together)}")
    if missing := ranks - len(standings):
        lines.append(f"{missing} of {ranks} ranks left no file: they had not begun to listen")
    return lines


def _main_thread(text: str) -> list[re.Match]:
    """Frames of the thread that began with the program, those of the backward pass that it waits for before them.

    Of the last one, which is the oldest, where a stack was too deep to be written whole.
    """
    threads = [list(filter(None, map(_FRAME.fullmatch, block.splitlines()))) for block in text.split("\n\n")]
    threads = [frames for frames in threads if frames]
    of_the_program = [frames for frames in threads if frames[-1]["function"] in _MAIN]
    main = (of_the_program or threads or [[]])[-1]
    if main and main[0]["function"] == "_engine_run_backward":  # on GPUs: hooks and recomputation run in a thread of autograd's own
        of_autograd = [frames for frames in threads if frames[-1]["function"] not in (*_MAIN, "_bootstrap")]
        main = [*(of_autograd or [[]])[-1], *main]
    return main


def _words(frame: re.Match) -> str:
    """function (file:line), the file from the repository or from site-packages on."""
    file = frame["file"].removeprefix(f"{_PROJECT}/")
    return f"{frame['function']} ({file.rpartition('site-packages/')[2]}:{frame['line']})"
