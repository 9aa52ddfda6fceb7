"""One checkpoint seen in the other's form: the same rows, through the runs of the table, a buffer at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch

from endprompt.checkpoint.mapping import (
    Row,
    huggingface_names,
    huggingface_shape,
    megatron_names,
    packed_runs,
    row_of,
    row_of_huggingface,
    source_runs,
)
from endprompt.checkpoint.safetensors_files import TensorInfo
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
BLOCK_BYTES = 2**20
"""Rows are moved through buffers of about this size. A block is copied in, digested and copied out, which is cheap while it stays in
the core's cache (1 to 2 MB): at 8 MB the kernel took 0.7 to 0.9 s of a core a GB, at 1 MB 0.4 to 0.5, at 256 KB calls cost more again."""


class TensorReader(Protocol):
    """What both formats offer: tensors by name, and the bytes of rows [start, stop) in the stored dtype."""

    tensors: dict[str, TensorInfo]

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None: ...


def row_blocks(info: TensorInfo, limit: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """[start, stop) row ranges of at most `limit` bytes (one row at least) that cover the tensor in order."""
    step = max(1, limit // max(1, info.row_bytes))
    for start in range(0, info.rows, step):
        yield start, min(info.rows, start + step)


def block_buffer(info: TensorInfo) -> memoryview:
    """Room for any block of `row_blocks`. One for all blocks of a tensor: new memory costs a page fault every 4 KB."""
    return memoryview(bytearray(max((stop - start) * info.row_bytes for start, stop in row_blocks(info))))


def tensors_of_huggingface(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the whole model in Hugging Face's files, embedding first, then layer by layer."""
    names = [name for parameter in parameters_by_layer(architecture) for name in huggingface_names(*row_of(parameter))]
    return {name: huggingface_shape(name, architecture) for name in names}


def parameters_by_layer(architecture: Architecture) -> list[str]:
    """Every Megatron parameter in the order in which Hugging Face's shards hold them, so that disks read forwards."""

    def place(name: str) -> tuple[int, int]:
        layer = row_of(name)[1]
        if layer is not None:
            return 1, layer
        return (0, 0) if name.startswith("embedding.") else (2, 0)

    return sorted(megatron_names(architecture), key=place)


class MegatronView:
    """Hugging Face tensors as Megatron parameters (local spec's numbered names). The vocabulary ends in `padding` zero rows."""

    def __init__(self, reader: TensorReader, architecture: Architecture, padding: int = 0):
        self._reader, self._architecture, self._vocabulary = reader, architecture, architecture.vocab_size
        self.tensors: dict[str, TensorInfo] = {}
        for name in parameters_by_layer(architecture):
            row, layer = row_of(name)
            sources = huggingface_names(row, layer)
            dtypes = {reader.tensors[source].dtype for source in sources}
            if len(dtypes) > 1:
                problem = f"{' and '.join(sources)} have different dtypes ({', '.join(sorted(dtypes))})"
                raise UserError("the source checkpoint", problem, "store them in one dtype: Megatron keeps them in one tensor")
            shape = huggingface_shape(sources[0], architecture)
            rows = sum(huggingface_shape(source, architecture)[0] for source in sources) + (padding if row.vocabulary else 0)
            self.tensors[name] = TensorInfo((rows, *shape[1:]), dtypes.pop())

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        row, layer = row_of(name)
        sources, width = huggingface_names(row, layer), self.tensors[name].row_bytes
        end = min(stop, self._vocabulary) if row.vocabulary else stop
        at = 0
        for index, first, count in source_runs(row.layout, self._architecture, start, end):
            self._reader.read(sources[index], first, first + count, into[at : at + count * width])
            at += count * width
        into[at:] = bytes(len(into) - at)


class HuggingFaceView:
    """Megatron parameters as Hugging Face tensors; padding rows of the vocabulary are left off, tied weights appear once.

    Raises UserError where the checkpoint's parameters are not those of the architecture. `padded` is the number of rows of
    the embedding.
    """

    def __init__(self, reader: TensorReader, architecture: Architecture, where: object):
        self._reader, self._architecture = reader, architecture
        expected = {name: self._expected_shape(name) for name in megatron_names(architecture)}
        _check_names(set(reader.tensors), set(expected), architecture, where)
        self.padded = reader.tensors["embedding.word_embeddings.weight"].rows
        for name, shape in expected.items():
            found = reader.tensors[name].shape
            if row_of(name)[0].vocabulary:
                _check_vocabulary(name, found, shape, self.padded, where)
            elif found != shape:
                raise UserError(where, f"{name} has shape {list(found)}, config.json implies {list(shape)}", "use the matching --hf-config")
        self.tensors = {}
        for name, shape in tensors_of_huggingface(architecture).items():
            self.tensors[name] = TensorInfo(shape, reader.tensors[self._parameter(name)[0]].dtype)

    def _expected_shape(self, name: str) -> tuple[int, ...]:
        shapes = [huggingface_shape(source, self._architecture) for source in huggingface_names(*row_of(name))]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _parameter(self, name: str) -> tuple[str, Row, int]:
        row, layer, index = row_of_huggingface(name)
        if name == "lm_head.weight" and self._architecture.tied:
            return "embedding.word_embeddings.weight", row, 0
        return row.megatron.format(layer), row, index

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        parameter, row, index = self._parameter(name)
        width, at = self._reader.tensors[parameter].row_bytes, 0
        for first, count in packed_runs(index, row.layout, self._architecture, start, stop):
            self._reader.read(parameter, first, first + count, into[at : at + count * width])
            at += count * width


class CastView:
    """A reader whose tensors have another dtype (F32, BF16, F16); values are rounded to nearest even, as torch does."""

    def __init__(self, reader: TensorReader, dtype: str):
        self._reader, self._dtype = reader, dtype
        self.tensors = {name: TensorInfo(info.shape, dtype) for name, info in reader.tensors.items()}

    def read(self, name: str, start: int, stop: int, into: memoryview) -> None:
        info = self._reader.tensors[name]
        if info.dtype == self._dtype:
            return self._reader.read(name, start, stop, into)
        raw = bytearray((stop - start) * info.row_bytes)
        self._reader.read(name, start, stop, memoryview(raw))
        torch.frombuffer(into, dtype=TORCH_DTYPES[self._dtype]).copy_(torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype]))


def read_tensor(reader: TensorReader, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows [start, stop) of a tensor, [rows, ...] in its stored dtype, in memory of their own."""
    info = reader.tensors[name]
    stop = info.rows if stop is None else stop
    raw = bytearray(max(1, (stop - start) * info.row_bytes))
    reader.read(name, start, stop, memoryview(raw)[: (stop - start) * info.row_bytes])
    count = (stop - start) * math.prod(info.shape[1:])
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[info.dtype], count=count).reshape(stop - start, *info.shape[1:])


def _check_names(found: set[str], expected: set[str], architecture: Architecture, where: object) -> None:
    for name in sorted(expected - found):
        fix = "the checkpoint may have tied embeddings: use the matching --hf-config" if name == "output_layer.weight" else (
            "use a complete checkpoint and the matching --hf-config"
        )  # fmt: skip
        raise UserError(where, f"has no tensor {name}", fix)
    for name in sorted(found - expected):
        fix = "use the matching --hf-config"
        if name == "output_layer.weight" and architecture.tied:
            fix = "the config ties embeddings and the checkpoint does not: use the matching --hf-config"
        raise UserError(where, f"has a tensor {name} that the config does not", fix)


def _check_vocabulary(name: str, found: tuple[int, ...], shape: tuple[int, ...], padded: int, where: object) -> None:
    if found[1:] != shape[1:] or found[0] < shape[0]:
        raise UserError(where, f"{name} has shape {list(found)}, the vocabulary needs {list(shape)}", "use the matching --hf-config")
    if found[0] != padded:
        raise UserError(where, f"{name} has {found[0]} rows, the embedding has {padded}", "use an undamaged checkpoint")
