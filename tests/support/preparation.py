"""Data preparation in a process that a test may kill. It must be importable by a fresh process, so it lies here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from endprompt.data import prepare as preparation
from endprompt.data.prepare import Job
from tests.support.forkserver import fork_context

SHARD_BYTES = (8 * 2**10, 8 * 2**10)
"""Small enough that a corpus of 1 MB makes more than a hundred shards."""


def job_for(folder: Path, tokenizer_folder: Path, **changes) -> Job:
    """Prepare a folder of text, beside it as out/data."""
    fields = {"inputs": (str(folder),), "tokenizer": str(tokenizer_folder), "output": str(Path(folder).parent / "out" / "data"), **changes}
    return Job(**fields)


def start_preparation(job: Job, *, workers: int = 2, kill_at_rename: int | None = None, overwrite: bool = False):
    """Start a preparation in a process that has transformers loaded already.

    kill_at_rename: the process kills itself (SIGKILL) instead of its n-th rename or unlink of a file, counted from 1.
    """
    process = fork_context().Process(target=_prepare, args=(job, workers, kill_at_rename, overwrite))
    process.start()
    return process


def _prepare(job: Job, workers: int, kill_at_rename: int | None, overwrite: bool) -> None:
    preparation.SHARD_BYTES = SHARD_BYTES
    if kill_at_rename is not None:
        _kill_at(kill_at_rename)
    preparation.prepare(job, workers=workers, overwrite=overwrite)


def _kill_at(count: int) -> None:
    calls = 0
    real = {"replace": os.replace, "unlink": os.unlink}

    def counted(name):
        def call(path, *arguments, **named):
            nonlocal calls
            if name == "replace" or os.path.exists(path):  # unlinks of temporaries that were renamed change nothing
                calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real[name](path, *arguments, **named)

        return call

    os.replace, os.unlink = counted("replace"), counted("unlink")


def samples_in_another_process(path: str, length: int, seed: int, count: int) -> list[list[int]]:
    """Texts of the first samples of a dataset, as PlainBuilder makes them."""
    from endprompt.data import SampleDataset
    from endprompt.recipe.schema import Source
    from tests.support.builders import PlainBuilder

    dataset = SampleDataset([Source(path=path)], PlainBuilder(length, length), seed)
    return [dataset[k].tokens.tolist() for k in range(count)]
