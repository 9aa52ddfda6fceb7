"""safetensors as bytes: headers checked before anything is believed, rows read with pread, headers written as safetensors does.

The library maps whole shards into memory, which counts as resident and grows with the shard; here memory is the caller's buffer.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.checkpoint.weights import INDEX, SINGLE
from endprompt.errors import UserError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = ("F32", "BF16", "F16")
_LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
_AGAIN = "download this shard again"


@dataclass(frozen=True)
class TensorInfo:
    """shape, and dtype in safetensors' words (BF16, F16, F32)."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one number, for a vector)."""
        return math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def bytes(self) -> int:
        return self.rows * self.row_bytes


@dataclass(frozen=True)
class Header:
    """Of one file: tensors in the order of the header, where their bytes begin in the file, the file's own metadata, and the
    header's JSON as it stands, blanks included."""

    tensors: dict[str, TensorInfo]
    starts: dict[str, int]
    metadata: dict[str, str]
    text: str


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """object_pairs_hook for json.loads: a name written twice is an error, not the last one's value."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is listed twice")
    return result


def read_header(path: Path) -> Header:
    """Read and check one file's header: known dtypes, and tensors that fill the file without gaps or overlaps. Raises UserError."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", prefix)[0] if len(prefix := file.read(8)) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise UserError(path, "is damaged or cut short (no whole header)", _AGAIN)
        text = file.read(length)
    try:
        text = text.decode()
        entries = json.loads(text, object_pairs_hook=unique_keys)
        metadata = entries.pop("__metadata__", {})
        tensors = {name: TensorInfo(tuple(entry["shape"]), entry["dtype"]) for name, entry in entries.items()}
        offsets = {name: tuple(entry["data_offsets"]) for name, entry in entries.items()}
        end = 0
        for name, (start, stop) in sorted(offsets.items(), key=lambda item: item[1]):
            info = tensors[name]
            if info.dtype not in ITEM_BYTES:
                raise UserError(path, f"{name} is stored as {info.dtype}", "use an unquantised checkpoint (fp32, bf16 or fp16)")
            if start != end or stop - start != info.bytes or any(type(n) is not int or n < 0 for n in info.shape):
                raise ValueError(f"{name} lies at bytes {start} to {stop}, which its shape or its neighbours contradict")
            end = stop
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(path, f"has a damaged header ({error})", _AGAIN) from None
    if 8 + length + end != size:
        raise UserError(path, f"is damaged or cut short ({size} bytes, its header says {8 + length + end})", _AGAIN)
    return Header(tensors, {name: 8 + length + start for name, (start, _) in offsets.items()}, metadata, text)


def make_header(
    tensors: dict[str, TensorInfo], metadata: dict[str, str] | None = None, wording: str | None = None
) -> tuple[bytes, dict[str, int]]:
    """(header bytes, start of each tensor in the file), tensors in the order given: what the safetensors library would write.

    Compact JSON, metadata first, padded with blanks to a multiple of 8. wording: another JSON text, taken where it says the
    same: writers differ in blanks and in the order of keys.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position, starts = 0, {}
    for name, info in tensors.items():
        entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, position + info.bytes]}
        starts[name] = position
        position += info.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if wording is not None and json.loads(wording) == entries:
        text = wording.encode()
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + start for name, start in starts.items()}


def library_order(tensors: dict[str, TensorInfo]) -> list[str]:
    """Names as the safetensors library orders them in a file: wide dtypes first, then by name."""
    return sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))


class SafetensorsFolder:
    """The tensors of a Hugging Face folder, read by rows. Safe to share between threads.

    Raises UserError at construction for a missing, pickled, damaged or truncated shard, an index that disagrees with the
    shards, and a tensor that two shards hold. `files` lists the shards in the order of their names, with their headers.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.files: dict[str, Header] = {}
        self._where: dict[str, tuple[str, int]] = {}
        self._descriptors: dict[str, int] = {}
        weight_map = self._weight_map()
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE]:
            self.files[file] = header = read_header(self._existing(file))
            for name in header.tensors:
                if name in self._where:
                    raise UserError(self.directory, f"{name} is in {self._where[name][0]} and in {file}", "remove the stale shard")
                if weight_map is not None and weight_map.get(name) != file:
                    said = f"{INDEX} puts it in {weight_map[name]}" if name in weight_map else f"{INDEX} does not list it"
                    raise UserError(self.directory / file, f"holds {name}, but {said}", "use the index and the shards of one download")
                self._where[name] = (file, header.starts[name])
        for name in sorted((weight_map or {}).keys() - self._where.keys()):
            raise UserError(self.directory / weight_map[name], f"lacks {name}, which {INDEX} promises", _AGAIN)
        self.tensors = {name: info for header in self.files.values() for name, info in header.tensors.items()}

    def _weight_map(self) -> dict[str, str] | None:
        index = self.directory / INDEX
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
                if not weight_map or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
                    raise ValueError("weight_map must name files in this folder")
                return weight_map
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(index, f"is not a safetensors index ({error})", "download it again") from None
        if (self.directory / SINGLE).is_file():
            return None
        if not self.directory.is_dir():
            raise UserError(self.directory, "no such folder", "give the folder of a Hugging Face checkpoint")
        if list(self.directory.glob("*.bin")) + list(self.directory.glob("*.pth")):
            raise UserError(self.directory, "has pickled weights only", "convert them to safetensors; this project opens no pickles")
        raise UserError(self.directory, f"has neither {INDEX} nor {SINGLE}", "give a Hugging Face checkpoint in safetensors")

    def _existing(self, file: str) -> Path:
        path = self.directory / file
        if not path.is_file():
            raise UserError(path, f"is listed in {INDEX} and missing", "download this shard")
        self._descriptors[file] = os.open(path, os.O_RDONLY)
        return path

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        """Bytes of rows [start, stop) of the tensor, in the stored dtype, into a buffer of exactly that size."""
        file, begin = self._where[name]
        read_exactly(self._descriptors[file], begin + start * self.tensors[name].row_bytes, into, self.directory / file)

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def read_exactly(descriptor: int, offset: int, into: memoryview, path: Path) -> None:
    """Fill `into` from `offset` of an open file. Raises UserError where the file ends too early (it shrank under us)."""
    while len(into):
        count = os.preadv(descriptor, [into], offset)
        if not count:
            raise UserError(path, "ended while it was being read", "leave the source alone while it is converted")
        into, offset = into[count:], offset + count


def check_tensors(found: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], optional: Iterable[str], where: object) -> None:
    """Exactly the tensors of `shapes` (and perhaps those of `optional`) with these shapes and float dtypes. Raises UserError."""
    for name in sorted(shapes.keys() - found.keys()):
        raise UserError(where, f"has no tensor {name}", "use a complete checkpoint of the architecture in its config.json")
    for name in sorted(found.keys() - shapes.keys() - set(optional)):
        problem = f"has a tensor {name} that the architecture does not"
        raise UserError(where, problem, "use an unquantised checkpoint without biases, adapters or experts")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise UserError(where, f"{name} has shape {list(found[name].shape)}, config.json implies {list(shape)}", "use matching files")
        if found[name].dtype not in FLOATS:
            raise UserError(where, f"{name} is stored as {found[name].dtype}", "use an unquantised checkpoint (fp32, bf16 or fp16)")
