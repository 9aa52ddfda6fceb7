"""One shard of a corpus to one part file. Runs in worker processes, which import neither torch nor transformers.

A part is `part-NNNNNN.bin` (tokens, then int32 token counts and int32 UTF-8 byte counts of its documents) and, written
after it, `part-NNNNNN.json`: the marker that the part is whole and belongs to the settings it names.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np

from endprompt.atomic import atomic_file, write_json
from endprompt.data.corpus import Segment, TextOptions
from endprompt.data.readers import Document, read_segment

BATCH_BYTES = 256 * 2**10
"""Text handed to the tokenizer at a time: 0.2 s of work, the grain of the progress bar and of stopping."""


@dataclass(frozen=True)
class Shard:
    """Consecutive segments, small enough to lose at a crash (about 10 s of work)."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class Encoding:
    """All that turns a shard into the bytes of its part. tokenizer_json: the whole tokenizer, as tokenizers writes it."""

    tokenizer_json: str
    bos_id: int | None
    eos_id: int | None
    dtype: str
    text: TextOptions


@dataclass(frozen=True)
class Part:
    """What a finished part holds. empty: documents skipped because they hold nothing but white space."""

    number: int
    documents: int
    tokens: int
    empty: int

    def path(self, folder: Path) -> Path:
        return folder / f"part-{self.number:06d}.bin"

    def lengths(self, folder: Path, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """int32 [documents] tokens and int32 [documents] UTF-8 bytes."""
        tail = np.fromfile(self.path(folder), dtype=np.int32, offset=self.tokens * dtype.itemsize)
        return tail[: self.documents], tail[self.documents :]


def find_part(folder: Path, number: int, settings: str, dtype: np.dtype) -> Part | None:
    """The finished part of a shard, if it was made with these settings and is whole."""
    try:
        marker = json.loads((folder / f"part-{number:06d}.json").read_text())
        part = Part(number, marker["documents"], marker["tokens"], marker["empty"])
        size = part.path(folder).stat().st_size
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return part if marker["settings"] == settings and size == part.tokens * dtype.itemsize + part.documents * 8 else None


class Stopped(Exception):
    """The parent asked this worker to give up its shard."""


_worker: dict[str, Any] = {}


def start_worker(encoding: Encoding, folder: Path, settings: str, progress: Any, stop: Any) -> None:
    """Initialise a worker process. progress: shared int64 of input bytes read; stop: shared event."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core already
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(encoding.tokenizer_json)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _worker.update(tokenizer=tokenizer, encoding=encoding, folder=folder, settings=settings, progress=progress, stop=stop, reported=0)


def _die_with_parent() -> None:
    """Pool workers outlive a parent killed by SIGKILL, blocked on its queue, unless somebody watches."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def tokenize_shard(shard: Shard) -> Part:
    """Write the part of a shard. Raises UserError for bad input, Stopped when the parent gives up."""
    folder, encoding = _worker["folder"], _worker["encoding"]
    path = Part(shard.number, 0, 0, 0).path(folder)
    token_counts: list[int] = []
    byte_counts: list[int] = []
    batch: list[str] = []
    batch_bytes = read = empty = 0
    with atomic_file(path, "wb") as file:
        for document in _documents(shard, encoding.text):
            read += document.used
            if not document.text or document.text.isspace():
                empty += 1
                continue
            batch.append(document.text)
            byte_counts.append(document.text_bytes)
            batch_bytes += document.text_bytes
            if batch_bytes >= BATCH_BYTES:
                token_counts += _encode(batch, file)
                batch, batch_bytes = [], 0
                _report(min(read, shard.size))
        token_counts += _encode(batch, file)
        file.write(np.array(token_counts + byte_counts, dtype=np.int32).tobytes())
    part = Part(shard.number, len(token_counts), sum(token_counts), empty)
    marker = {"settings": _worker["settings"], "documents": part.documents, "tokens": part.tokens, "empty": empty}
    write_json(path.with_suffix(".json"), marker)
    _report(shard.size, finished=True)
    return part


def _documents(shard: Shard, options: TextOptions) -> Iterator[Document]:
    for segment in shard.segments:
        yield from read_segment(segment, options)


def _encode(texts: list[str], file: IO[bytes]) -> list[int]:
    """Append the tokens of documents to the part; returns how many tokens each has."""
    encoding = _worker["encoding"]
    before = [] if encoding.bos_id is None else [encoding.bos_id]
    after = [] if encoding.eos_id is None else [encoding.eos_id]
    counts = []
    for encoded in _worker["tokenizer"].encode_batch_fast(texts, add_special_tokens=False):
        tokens = np.array(before + encoded.ids + after, dtype=encoding.dtype)  # raises OverflowError rather than wrap
        file.write(tokens.tobytes())
        counts.append(len(tokens))
    return counts


def _report(read: int, finished: bool = False) -> None:
    """Tell the parent that `read` bytes of the current shard are used up."""
    progress = _worker["progress"]
    with progress.get_lock():
        progress.value += read - _worker["reported"]
    _worker["reported"] = 0 if finished else read
    if _worker["stop"].is_set() and not finished:
        raise Stopped
