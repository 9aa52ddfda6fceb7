"""Lay out and describe a torch_dist checkpoint that dist_checkpointing.load reads at any parallel layout.

Each chunk of a tensor is a torch.save file within a .distcp file: a zip archive with the records data.pkl, byteorder, data/0
and version. Its size is known before any number is, so chunks are written straight to their place, through small buffers.

The archive's checksum of the numbers is left 0, as torch.serialization.set_crc32_options(False) does: torch.load never looks
at it, and summing took a quarter of the conversion's time. What guards the numbers is the digest of every tensor in
endprompt_conversion.json, which verify_checkpoint.py compares; unzip -t would complain.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from endprompt.checkpoint.mapping import disk_name, row_of
from endprompt.checkpoint.safetensors_files import ITEM_BYTES, TensorInfo
from endprompt.checkpoint.views import TORCH_DTYPES, row_blocks

CHUNK_BYTES = 128 * 2**20
"""Largest chunk. A rank that loads reads whole chunks, so smaller ones save it memory and reading under tensor parallelism."""

FILE_BYTES = 2**30

STRIPES = 4
"""Files that grow at once. A file takes one write at a time (its inode's lock), so threads on one file would wait and spin."""

_PAGE = 4096
"""Numbers begin at a page of the file: copying 8 MB to an odd address took the kernel twice as long as to a page (measured)."""

_ALIGNMENT = 64  # torch aligns the numbers of an archive to this
_STORAGES = {"BF16": torch.BFloat16Storage, "F16": torch.HalfStorage, "F32": torch.FloatStorage}
_EXTRA_STATE_OF_LAYERS = (
    "self_attention.core_attention", "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
)  # fmt: skip
"""Modules whose `_extra_state` Megatron asks for when it loads (linear layers always, the others with Transformer Engine)."""


@dataclass(frozen=True)
class Blob:
    """One chunk of parameter `name`: rows [start, stop), and where its archive goes."""

    name: str
    start: int
    stop: int
    file: str
    offset: int
    archive: Archive

    @property
    def length(self) -> int:
        return self.archive.length


class Archive:
    """The bytes around the numbers of a torch.save file of one contiguous tensor."""

    def __init__(self, info: TensorInfo, shape: tuple[int, ...]):
        self.data_bytes = torch.Size(shape).numel() * ITEM_BYTES[info.dtype]
        before = b"".join(_local(name, data) for name, data in (("data.pkl", _tensor_pickle(info.dtype, shape)), ("byteorder", b"little")))
        # zip offers an extra field, here filled so that the numbers begin at a multiple of 64.
        gap = -(len(before) + 30 + len("archive/data/0") + 4) % _ALIGNMENT
        self._padding = struct.pack("<2sH", b"FB", gap) + b"Z" * gap
        self._before, self._pickle = before, _tensor_pickle(info.dtype, shape)
        self.data_start = len(before) + 30 + len("archive/data/0") + len(self._padding)
        self.length = self.data_start + self.data_bytes + len(self.tail())

    def head(self) -> bytes:
        """Everything before the numbers."""
        return self._before + _header("data/0", 0, self.data_bytes, self._padding)

    def tail(self) -> bytes:
        """Everything behind the numbers: the version record and the directory."""
        version = _local("version", b"3\n")
        records = [("data.pkl", zlib.crc32(self._pickle), len(self._pickle), 0)]
        records.append(("byteorder", zlib.crc32(b"little"), 6, len(_local("data.pkl", self._pickle))))
        records.append(("data/0", 0, self.data_bytes, len(self._before)))
        records.append(("version", zlib.crc32(b"3\n"), 2, self.data_start + self.data_bytes))
        directory = b"".join(_directory_entry(*record) for record in records)
        start = self.data_start + self.data_bytes + len(version)
        return version + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, len(records), len(records), len(directory), start, 0)


def _header(name: str, crc: int, size: int, extra: bytes = b"") -> bytes:
    path = b"archive/" + name.encode()
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, 0, crc, size, size, len(path), len(extra)) + path + extra


def _local(name: str, data: bytes) -> bytes:
    return _header(name, zlib.crc32(data), len(data)) + data


def _directory_entry(name: str, crc: int, size: int, offset: int) -> bytes:
    path = b"archive/" + name.encode()
    fields = (b"PK\1\2", 20, 20, 0, 0, 0, 0, crc, size, size, len(path), 0, 0, 0, 0, 0, offset)
    return struct.pack("<4s6H3I5H2I", *fields) + path


class _Storage:
    """Stands for the storage of a tensor that is not in memory."""

    def __init__(self, dtype: str, count: int):
        self.identifier = ("storage", _STORAGES[dtype], "0", "cpu", count)


class _Tensor:
    def __init__(self, dtype: str, shape: tuple[int, ...]):
        stride = tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))
        storage = _Storage(dtype, torch.Size(shape).numel())
        self._arguments = (storage, 0, tuple(shape), stride, False, collections.OrderedDict())

    def __reduce__(self) -> tuple:
        return torch._utils._rebuild_tensor_v2, self._arguments


class _TensorPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identifier if isinstance(obj, _Storage) else None


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """data.pkl of torch.save for a contiguous tensor of its own storage."""
    buffer = io.BytesIO()
    _TensorPickler(buffer, protocol=2).dump(_Tensor(dtype, shape))
    return buffer.getvalue()


def plan_blobs(tensors: dict[str, TensorInfo]) -> list[Blob]:
    """Chunks of every parameter, dealt out to files `__<n>_0.distcp` of at most FILE_BYTES; gaps are below a page."""
    blobs, ends, numbers, count = [], [0] * STRIPES, list(range(STRIPES)), STRIPES
    for name, info in tensors.items():
        stripe = ends.index(min(ends))  # the emptiest
        for start, stop in row_blocks(info, CHUNK_BYTES):
            archive = Archive(info, _disk_shape(name, info, stop - start))
            if ends[stripe] and ends[stripe] + archive.length > FILE_BYTES:
                ends[stripe], numbers[stripe], count = 0, count, count + 1
            offset = ends[stripe] + -(ends[stripe] + archive.data_start) % _PAGE
            blobs.append(Blob(name, start, stop, f"__{numbers[stripe]}_0.distcp", offset, archive))
            ends[stripe] = offset + archive.length
    return blobs


def _disk_shape(name: str, info: TensorInfo, rows: int) -> tuple[int, ...]:
    leading = () if row_of(name)[1] is None else (1,)
    return (*leading, rows, *info.shape[1:])


def write_description(folder: Path, tensors: dict[str, TensorInfo], blobs: list[Blob], layers: int, common: dict[str, Any]) -> None:
    """Write .metadata, common.pt, metadata.json and the `_extra_state` objects: everything but the numbers.

    Layers are stacked on a leading axis (Megatron's default). An `_extra_state` says None, as an unquantised model's does.
    common: contents of common.pt, plain values; dist_checkpointing.load adds them to what it returns.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for blob in blobs:
        row, layer = row_of(blob.name)
        key, info = disk_name(row), tensors[blob.name]
        if key not in entries:
            size = info.shape if layer is None else (layers, *info.shape)
            entries[key] = TensorStorageMetadata(TensorProperties(dtype=TORCH_DTYPES[info.dtype]), torch.Size(size), [])
        inside = (blob.start, *(0 for _ in info.shape[1:]))
        offsets = torch.Size(inside if layer is None else (layer, *inside))
        entries[key].chunks.append(ChunkStorageMetadata(offsets, torch.Size(_disk_shape(blob.name, info, blob.stop - blob.start))))
        storage[MetadataIndex(key, offsets)] = _StorageInfo(blob.file, blob.offset, blob.length)

    buffer = io.BytesIO()
    torch.save([None], buffer)
    names = [f"decoder.layers.{module}._extra_state/shard_{layer}_{layers}" for module in _EXTRA_STATE_OF_LAYERS for layer in range(layers)]
    names.append("decoder.final_layernorm._extra_state/shard_0_1")
    objects = "__objects_0.distcp"
    for number, name in enumerate(names):
        entries[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(objects, number * len(buffer.getvalue()), len(buffer.getvalue()))
    (folder / objects).write_bytes(buffer.getvalue() * len(names))

    with open(folder / ".metadata", "wb") as file:
        pickle.dump(Metadata(entries, None, storage, StorageMeta(), "1.0.0"), file)
    torch.save(common, folder / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(formats))
