"""Megatron indexed datasets: `PREFIX.bin` holds token ids back to back, `PREFIX.idx` says where documents begin.

The format is that of megatron/core/datasets/indexed_dataset.py (magic MMIDIDX, version 1). The reader is our own because
importing megatron.core costs 4 s and is not wanted on machines that train with DeepSpeed only; tests hold its bytes against
Megatron's reader and builder in both directions.

Layout of .idx, little endian: magic 9 bytes, version uint64, dtype code uint8, S sequences uint64, D + 1 document
boundaries uint64, lengths int32 [S] in tokens, pointers int64 [S] in bytes into .bin, boundaries int64 [D + 1] in sequences.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from endprompt.atomic import atomic_file
from endprompt.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Codes of integer dtypes. Megatron also has 6 (float64) and 7 (float32), which cannot hold token ids."""

REBUILD = "make it again with tools/prepare_data.py"


def dtype_for(vocab_size: int) -> np.dtype:
    """The dtype that Megatron chooses for a vocabulary (`DType.optimal_dtype`): uint16 below 65500, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def bin_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.idx")


class IndexedText:
    """A dataset seen as one stream of tokens with document boundaries. Made by `open_indexed`; safe to pickle and to fork.

    prefix: path without .bin and .idx. dtype: of the tokens on disk. num_tokens: length of the stream.
    """

    def __init__(self, prefix: Path, tokens: np.memmap, sequence_starts: np.ndarray, boundaries: np.ndarray):
        self.prefix, self.dtype, self.num_tokens = prefix, tokens.dtype, len(tokens)
        self._tokens, self._sequence_starts, self._boundaries = tokens, sequence_starts, boundaries

    def __reduce__(self):  # a pickled memmap would carry the whole corpus
        return open_indexed, (self.prefix,)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._boundaries) - 1

    @cached_property
    def document_starts(self) -> np.ndarray:
        """int64 [documents + 1]: where documents begin in the stream, in tokens; the last entry is num_tokens."""
        return self._sequence_starts[self._boundaries]

    @property
    def document_lengths(self) -> np.ndarray:
        """int64 [documents], in tokens, the end-of-text token included where one was appended."""
        return np.diff(self.document_starts)

    def read(self, start: int, length: int) -> np.ndarray:
        """int64 [length]: a copy of tokens start .. start + length of the stream. ValueError outside of the stream."""
        if not 0 <= start <= start + length <= self.num_tokens:
            raise ValueError(f"tokens {start}..{start + length} lie outside of a stream of {self.num_tokens}")
        return self._tokens[start : start + length].astype(np.int64)

    def document(self, i: int) -> np.ndarray:
        """int64 [document_lengths[i]]: a copy of the tokens of document i."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        start, stop = self.document_starts[i : i + 2]
        return self.read(int(start), int(stop - start))


def open_indexed(prefix: str | Path) -> IndexedText:
    """Open and fully validate `prefix`.bin and `prefix`.idx.

    Raises UserError for a missing, truncated, foreign or empty file, an unsupported dtype, or files that disagree.
    """
    data, index = bin_path(prefix), idx_path(prefix)
    for path in (index, data):
        if not path.is_file():
            hint = "give the prefix without .bin or .idx" if str(prefix).endswith((".bin", ".idx")) else REBUILD.replace("again ", "")
            raise UserError(path, "no such file", hint)
    dtype, lengths, pointers, boundaries = _read_index(index)
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    if not (lengths >= 0).all() or not np.array_equal(pointers, (ends - lengths) * dtype.itemsize):
        raise UserError(index, "sequences do not lie back to back in the .bin file", REBUILD)
    steps = np.diff(boundaries)
    if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != len(lengths) or not (steps >= 0).all():
        raise UserError(index, f"document boundaries do not run from 0 to {len(lengths)} sequences", REBUILD)
    size = data.stat().st_size
    if size != total * dtype.itemsize:
        raise UserError(data, f"has {size} bytes, its index says {total * dtype.itemsize}", REBUILD)
    if total == 0:
        raise UserError(data, "holds no tokens", "prepare it from text that is not empty")
    sequence_starts = np.concatenate([np.zeros(1, np.int64), ends])
    return IndexedText(Path(prefix), np.memmap(data, dtype=dtype, mode="r"), sequence_starts, boundaries)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """dtype of .bin, and lengths, pointers and document boundaries as views of the mapped file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
        raise UserError(path, "is not a Megatron index (wrong magic)", "give the prefix of a dataset made by tools/prepare_data.py")
    if len(head) < HEADER.size:
        raise UserError(path, f"is truncated: {size} bytes, the header alone has {HEADER.size}", REBUILD)
    _, version, code, sequences, marks = HEADER.unpack(head)
    if version != VERSION:
        raise UserError(path, f"has index version {version}, only {VERSION} is known", REBUILD)
    if code not in DTYPES:
        raise UserError(path, f"has dtype code {code}, which does not hold token ids", f"{REBUILD} (codes {sorted(DTYPES)} are read)")
    expected = HEADER.size + sequences * (4 + 8) + marks * 8
    if size < expected:
        raise UserError(path, f"is truncated: {size} bytes, its header says {expected}", REBUILD)
    if size > expected:
        raise UserError(path, f"has {size - expected} bytes more than a text index (multimodal?)", REBUILD)
    raw = np.memmap(path, mode="r")

    def view(dtype, count, offset):
        return np.frombuffer(raw, dtype=dtype, count=count, offset=offset) if count else np.empty(0, dtype)

    lengths = view("<i4", sequences, HEADER.size)
    pointers = view("<i8", sequences, HEADER.size + 4 * sequences)
    return np.dtype(DTYPES[code]), lengths, pointers, view("<i8", marks, HEADER.size + 12 * sequences)


def index_bytes(lengths: np.ndarray, dtype: np.dtype) -> Iterator[bytes]:
    """The .idx file, in pieces, of a dataset with one sequence per document. lengths: [documents] in tokens."""
    code = next(code for code, known in DTYPES.items() if known == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    yield HEADER.pack(MAGIC, VERSION, code, len(lengths), len(lengths) + 1)
    yield np.asarray(lengths, dtype="<i4").tobytes()
    yield ((ends - lengths) * np.dtype(dtype).itemsize).astype("<i8").tobytes()
    yield np.arange(len(lengths) + 1, dtype="<i8").tobytes()


def write_indexed(prefix: str | Path, documents: Iterable[np.ndarray], dtype: np.dtype | type) -> None:
    """Write documents (1-D integer arrays, ids within dtype) as `prefix`.bin and `prefix`.idx, each atomically."""
    lengths, limits = [], np.iinfo(dtype)
    with atomic_file(bin_path(prefix), "wb") as file:
        for tokens in documents:
            tokens = np.asarray(tokens)
            if len(tokens) and not limits.min <= tokens.min() <= tokens.max() <= limits.max:
                raise ValueError(f"token ids {tokens.min()}..{tokens.max()} do not fit {np.dtype(dtype)}")
            file.write(tokens.astype(dtype).tobytes())
            lengths.append(len(tokens))
    with atomic_file(idx_path(prefix), "wb") as file:
        file.writelines(index_bytes(np.array(lengths, dtype=np.int64), np.dtype(dtype)))
