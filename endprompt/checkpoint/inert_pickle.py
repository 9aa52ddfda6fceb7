"""Read the two pickles of a torch_dist checkpoint without letting them run anything.

`.metadata` (torch.distributed.checkpoint) and the `data.pkl` inside every tensor blob (torch.save) are pickles, and a pickle
may call any function it names. Here every name it may use is on a list and stands for an inert value of ours; no module
is imported, and any other name refuses the file.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import IO, Any

from endprompt.errors import UserError

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
"""torch's names to safetensors' names of the dtypes that weights may have."""

_OTHER_DTYPES = ("float64", "int64", "int32", "int16", "int8", "uint8", "bool", "float8_e4m3fn", "float8_e5m2")


class Record:
    """Stands for an object of the pickle: positional `arguments` and, as attributes, whatever state it was given."""

    def __new__(cls, *arguments: Any) -> Record:
        record = super().__new__(cls)
        record.arguments = arguments
        return record

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (instance dictionary, slots)
            state = {**(state[0] or {}), **(state[1] or {})}
        if not isinstance(state, dict) or not all(isinstance(key, str) and key.isidentifier() for key in state):
            raise pickle.UnpicklingError("an object has no plain fields")
        self.__dict__.update(state)


class Properties(Record):
    """TensorProperties, whose state is a tuple that begins with the dtype."""

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


def _size(items: Any = ()) -> tuple:
    return tuple(items)


def _ignore(*arguments: Any) -> None:
    return None


_CHECKPOINT = "torch.distributed.checkpoint"
_MEGATRON = "megatron.core.dist_checkpointing.strategies"
METADATA_NAMES: dict[tuple[str, str], Any] = {
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _ignore,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): _ignore,
    ("pathlib", "PurePosixPath"): _ignore,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): Properties,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _ignore,
    (f"{_CHECKPOINT}.planner", "WriteItemType"): _ignore,
    **{
        (f"{_CHECKPOINT}.metadata", name): Record
        for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "StorageMeta")
    },
    **{(f"{_CHECKPOINT}.planner", name): Record for name in ("SavePlan", "TensorWriteData", "WriteItem", "BytesIOWriteData")},
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): Record,
    (f"{_MEGATRON}.torch", "MCoreMetadata"): Record,
    (f"{_MEGATRON}.torch", "MCoreSavePlan"): Record,
    **{("torch", name): said for name, said in DTYPES.items()},
    **{("torch", name): name for name in _OTHER_DTYPES},
}
"""Everything that `.metadata` may name."""

_STORAGES = {"BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32"}
TENSOR_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): Record,
    ("collections", "OrderedDict"): dict,
    **{("torch", name): said for name, said in _STORAGES.items()},
}
"""Everything that the pickle of a plain bf16, fp16 or fp32 tensor names."""


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], names: dict[tuple[str, str], Any]):
        super().__init__(file)
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None

    def persistent_load(self, identifier: Any) -> Any:
        return identifier


def load(file: IO[bytes], names: dict[tuple[str, str], Any], where: str | Path) -> Any:
    """The pickle in `file` as Records and plain values. Raises UserError for one that is damaged or asks for anything else."""
    try:
        return _InertUnpickler(file, names).load()
    except OSError:
        raise
    except Exception as error:  # a damaged or hostile pickle may raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(where, f"is not a pickle that this project reads ({reason})", "use an undamaged torch_dist checkpoint") from None
