"""Read Megatron-Core's torch_dist checkpoints by rows, without torch.distributed, process groups or pickled code.

A checkpoint is `.metadata` (which part of which tensor lies where), `*.distcp` (torch.save blobs one after another),
`common.pt` (never opened here) and `metadata.json`. Layers are stacked on a leading axis under one key, or, with Megatron's
`singleton_local_shards` or `non_homogeneous_layers`, numbered in the key; both come out as numbered parameters.
"""

from __future__ import annotations

import bisect
import io
import json
import math
import os
import re
import struct
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt.checkpoint import inert_pickle
from endprompt.checkpoint.mapping import TRANSFORMER_ENGINE_NAMES, row_of
from endprompt.checkpoint.safetensors_files import FLOATS, ITEM_BYTES, TensorInfo, read_exactly
from endprompt.errors import UserError

_LAYER_KEY = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)")
_HALF = re.compile(r"(?<=\.linear_fc1\.weight)_[wv]$")
"""With `singleton_local_shards` gate (w) and up (v) are tensors of their own."""

_AGAIN = "copy the checkpoint again"


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor: rows [row, row + rows), columns [column, column + columns) (1 for a vector), and its blob."""

    row: int
    rows: int
    column: int
    columns: int
    file: str
    offset: int
    length: int


class TorchDistCheckpoint:
    """Model parameters of a checkpoint folder, under the local spec's numbered names. Safe to share between threads.

    `tensors` has every tensor of the model; optimizer tensors and `_extra_state` objects are left out. Raises UserError for
    another format, damaged or hostile metadata, overlapping or missing parts, and tensors that the table does not know.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.tensors: dict[str, TensorInfo] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._data_starts: dict[tuple[str, int], int] = {}
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        _check_format(self.directory)
        path = self.directory / ".metadata"
        with open(path, "rb") as file:
            metadata = inert_pickle.load(file, inert_pickle.METADATA_NAMES, path)
        try:
            self._read(metadata, path)
        except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
            raise UserError(path, f"does not describe a checkpoint ({type(error).__name__}: {error})", _AGAIN) from None
        if not self.tensors:
            raise UserError(path, "lists no model parameters", "give a GPT checkpoint of Megatron-Core")

    def _read(self, metadata: inert_pickle.Record, path: Path) -> None:
        # Objects (optimizer groups, _extra_state) have no offset, tensors always have one.
        entries = metadata.storage_data.items()
        storage = {(index.fqn, tuple(index.offset)): info for index, info in entries if hasattr(index, "offset")}
        unknown = []
        for key, entry in metadata.state_dict_metadata.items():
            if not hasattr(entry, "chunks") or _is_optimizer(key):
                continue
            try:
                row_of(_numbered(_HALF.sub("", key), 0))
            except KeyError:
                unknown.append(key)
                continue
            self._add(key, entry, storage)
        if unknown:
            problem = f"has a tensor {sorted(unknown)[0]} that a LLaMA decoder does not"
            raise UserError(self.directory, problem, "use a checkpoint without biases, experts or adapters")
        for name in self.tensors:
            self._check_complete(name, path)

    def _add(self, key: str, entry: inert_pickle.Record, storage: dict) -> None:
        shape, dtype = tuple(entry.size), entry.properties.dtype
        half = _HALF.search(key)
        found = _LAYER_KEY.fullmatch(_HALF.sub("", key))
        stacked = bool(found and found[1] is None)
        if dtype not in FLOATS:
            raise UserError(self.directory, f"{key} is stored as {dtype}", "use an unquantised checkpoint (fp32, bf16 or fp16)")
        for chunk in entry.chunks:
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            where = storage.get((key, offsets))
            if where is None:
                raise UserError(self.directory / ".metadata", f"does not say where {key} at {list(offsets)} lies", _AGAIN)
            if getattr(where, "transform_descriptors", None):
                raise UserError(self.directory / ".metadata", f"{key} is stored compressed", "save it without transforms")
            if stacked and sizes[0] != 1:
                raise UserError(self.directory / ".metadata", f"{key} packs {sizes[0]} layers into one part", "save it with Megatron-Core")
            name = _numbered(_HALF.sub("", key), offsets[0] if stacked else 0)
            offsets, sizes = (offsets[1:], sizes[1:]) if stacked else (offsets, sizes)
            rows, *columns = shape[1:] if stacked else shape
            inner = TensorInfo((2 * rows if half else rows, *columns), dtype)
            if half and half[0] == "_v":
                offsets = (offsets[0] + rows, *offsets[1:])
            if self.tensors.setdefault(name, inner) != inner:
                raise UserError(self.directory / ".metadata", f"describes {name} twice", _AGAIN)
            offsets, sizes = (*offsets, 0), (*sizes, 1)  # a vector has one column
            file = str(where.relative_path)
            if Path(file).name != file:
                raise UserError(self.directory / ".metadata", f"names a file outside the checkpoint ({file})", _AGAIN)
            part = Chunk(offsets[0], sizes[0], offsets[1], sizes[1], file, int(where.offset), int(where.length))
            self._chunks.setdefault(name, []).append(part)

    def _check_complete(self, name: str, path: Path) -> None:
        """The parts of a tensor tile it: cuts along columns repeat for each cut along rows, with no gap and no overlap."""
        info, chunks = self.tensors[name], self._chunks[name]
        width = info.shape[1] if len(info.shape) > 1 else 1
        if len(info.shape) not in (1, 2) or any(not isinstance(size, int) or size < 1 for size in info.shape):
            raise UserError(path, f"{name} has shape {list(info.shape)}", "use a LLaMA-like checkpoint")
        chunks.sort(key=lambda chunk: (chunk.row, chunk.column))
        row, at = 0, 0
        while at < len(chunks):
            band = [chunk for chunk in chunks[at:] if chunk.row == chunks[at].row]
            column = 0
            for chunk in band:
                if min(chunk.rows, chunk.columns) < 1 or chunk.row != row or chunk.rows != band[0].rows or chunk.column != column:
                    raise UserError(path, f"{name}: parts overlap or leave a gap at row {row}, column {column}", _AGAIN)
                column += chunk.columns
            if column != width:
                raise UserError(path, f"{name}: parts cover {column} of {width} columns", _AGAIN)
            row, at = row + band[0].rows, at + len(band)
        if row != info.rows:
            raise UserError(path, f"{name}: parts cover {row} of {info.rows} rows", _AGAIN)

    def check_blobs(self) -> None:
        """Look into every blob: there, whole, of the dtype and shape that `.metadata` states. Raises UserError."""
        for name, chunks in self._chunks.items():
            for chunk in chunks:
                self._data_start(name, chunk)

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        """Bytes of rows [start, stop) of the tensor, in the stored dtype, into a buffer of exactly that size."""
        info, chunks = self.tensors[name], self._chunks[name]
        item, width = ITEM_BYTES[info.dtype], info.row_bytes
        target = np.frombuffer(into, np.uint8).reshape(stop - start, width)
        first = bisect.bisect_right([chunk.row for chunk in chunks], start) - 1
        first = bisect.bisect_left([chunk.row for chunk in chunks], chunks[first].row)  # its whole band
        for chunk in chunks[first:]:
            if chunk.row >= stop:
                break
            top, bottom = max(start, chunk.row), min(stop, chunk.row + chunk.rows)
            stride = chunk.columns * item
            begin = self._data_start(name, chunk) + (top - chunk.row) * stride
            path = self.directory / chunk.file
            if stride == width:
                read_exactly(self._descriptor(chunk.file), begin, into[(top - start) * width : (bottom - start) * width], path)
            else:  # cut by columns: its rows, then each row to its place
                part = memoryview(bytearray((bottom - top) * stride))
                read_exactly(self._descriptor(chunk.file), begin, part, path)
                left = chunk.column * item
                target[top - start : bottom - start, left : left + stride] = np.frombuffer(part, np.uint8).reshape(-1, stride)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                try:
                    self._descriptors[file] = os.open(self.directory / file, os.O_RDONLY)
                except FileNotFoundError:
                    raise UserError(self.directory / file, "is missing, and .metadata needs it", _AGAIN) from None
            return self._descriptors[file]

    def _data_start(self, name: str, chunk: Chunk) -> int:
        """Offset in the file of the first byte of the chunk's numbers; the blob is checked on the way, once."""
        known = self._data_starts.get((chunk.file, chunk.offset))
        if known is not None:
            return known
        path, info = self.directory / chunk.file, self.tensors[name]
        blob = _Slice(self._descriptor(chunk.file), chunk.offset, chunk.length)
        try:
            with zipfile.ZipFile(blob) as archive:
                entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
                pickled = archive.read(entries["data.pkl"])
                data = entries["data/0"]
            blob.seek(data.header_offset)
            header = struct.unpack("<4s5H3I2H", blob.read(30))
        except (zipfile.BadZipFile, KeyError, ValueError, struct.error, NotImplementedError, EOFError) as error:
            problem = f"is damaged or cut short where {name} lies ({type(error).__name__}: {error})"
            raise UserError(path, problem, _AGAIN) from None
        tensor = inert_pickle.load(io.BytesIO(pickled), inert_pickle.TENSOR_NAMES, f"{path}: {name}")
        item = ITEM_BYTES[info.dtype]
        try:
            (_, dtype, _, _, _), first, shape, stride = tensor.arguments[:4]
            sizes = [size for size in shape if size != 1]
            contiguous = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            dense = all(size == 1 or have == want for size, have, want in zip(shape, stride, contiguous, strict=True))
            good = dtype == info.dtype and dense and sizes == [size for size in (chunk.rows, chunk.columns) if size != 1]
            good = good and data.compress_type == 0 and (first + math.prod(shape)) * item <= data.file_size
        except (AttributeError, TypeError, ValueError):
            good = False
        begin = data.header_offset + 30 + header[-2] + header[-1]
        if not good or begin + data.file_size > chunk.length:
            raise UserError(path, f"the part of {name} in it is not what .metadata describes", _AGAIN)
        self._data_starts[chunk.file, chunk.offset] = start = chunk.offset + begin + first * item
        return start

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def _check_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        backend = json.loads(path.read_text())["sharded_backend"]
    except (ValueError, KeyError, TypeError):
        raise UserError(path, "does not name a checkpoint format", _AGAIN) from None
    if backend != "torch_dist":
        raise UserError(path, f"the format is {backend}, only torch_dist is read", "save it again with --ckpt-format torch_dist")
    if not (directory / ".metadata").is_file():
        raise UserError(directory / ".metadata", "is missing: the save did not finish", "use another checkpoint")


def _is_optimizer(key: str) -> bool:
    return key.startswith(("optimizer.", "chained_")) or "rng_state" in key or key.startswith("rerun_state")


def _numbered(key: str, layer: int) -> str:
    """The local spec's name of a key; `layer` goes in where the key has no layer of its own."""
    found = _LAYER_KEY.fullmatch(key)
    if not found:
        return key
    pattern = "decoder.layers.{}." + found[2]
    return TRANSFORMER_ENGINE_NAMES.get(pattern, pattern).replace("{}", found[1] or str(layer))


class _Slice(io.RawIOBase):
    """A part of an open file as a seekable file of its own, for zipfile."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self._descriptor, self._offset, self._length, self._position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("seek before the start")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        data = os.pread(self._descriptor, left if size is None or size < 0 else min(size, left), self._offset + self._position)
        self._position += len(data)
        return data
