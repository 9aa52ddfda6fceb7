"""How a source cut its tensors into shards, kept in the Megatron checkpoint so that the way back gives the same files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.atomic import write_json
from endprompt.checkpoint.companions import plan_shards, shard_name
from endprompt.checkpoint.safetensors_files import SafetensorsFolder, TensorInfo, library_order
from endprompt.checkpoint.weights import INDEX, SINGLE
from endprompt.errors import UserError

LAYOUT = "endprompt_layout.json"


@dataclass(frozen=True)
class Shard:
    """A file, its tensors in the order of their bytes, the header's own metadata, and its wording where one is to be kept."""

    file: str
    names: list[str]
    metadata: dict[str, str]
    header: str | None = None


def layout_of(reader: SafetensorsFolder) -> list[Shard]:
    def by_offset(file: str) -> list[str]:
        return sorted(reader.files[file].tensors, key=lambda name: reader.files[file].starts[name])

    return [Shard(file, by_offset(file), header.metadata, header.text) for file, header in reader.files.items()]


def record_layout(folder: Path, reader: SafetensorsFolder) -> None:
    write_json(folder / LAYOUT, [vars(shard) for shard in layout_of(reader)])


def recorded_layout(folder: Path) -> list[Shard] | None:
    """The layout kept in a Megatron checkpoint, None where there is none. Raises UserError for a damaged one."""
    path = folder / LAYOUT
    if not path.is_file():
        return None
    try:
        shards = [Shard(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
        for shard in shards:
            strings = [shard.file, *shard.names, *shard.metadata, *shard.metadata.values()]
            if not all(isinstance(text, str) for text in strings) or Path(shard.file).name != shard.file:
                raise ValueError("not a list of files with their tensors")
            json.loads(shard.header or "{}")
        return shards
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(path, f"cannot be read ({error})", "remove it; shards are then cut anew") from None


def fitting(shards: list[Shard] | None, tensors: dict[str, TensorInfo], also: str | None) -> list[Shard] | None:
    """The layout without names that are no tensors (old rotary buffers), if it then holds each tensor once; else None.

    also: a further tensor that the layout may hold (the copy of tied embeddings).
    """
    if not shards:
        return None
    allowed = tensors.keys() | ({also} if also else set())
    kept = [Shard(shard.file, [name for name in shard.names if name in allowed], shard.metadata, shard.header) for shard in shards]
    names = [name for shard in kept for name in shard.names]
    if len(names) != len(set(names)) or not tensors.keys() <= set(names):
        return None
    return [shard for shard in kept if shard.names]


def new_layout(tensors: dict[str, TensorInfo], limit: float) -> list[Shard]:
    """Shards of at most `limit` bytes, named and ordered as transformers and safetensors do."""
    plan = plan_shards([(name, info.bytes) for name, info in tensors.items()], limit)
    shards = []
    for number, shard in enumerate(plan):
        names = library_order({name: tensors[name] for name, _ in shard})
        shards.append(Shard(shard_name(number, len(plan)), names, {"format": "pt"}))
    return shards


def write_index(folder: Path, shards: list[Shard], tensors: dict[str, TensorInfo]) -> None:
    """model.safetensors.index.json, unless one file of the plain name holds everything."""
    if [shard.file for shard in shards] == [SINGLE]:
        return
    weight_map: dict[str, Any] = {name: shard.file for shard in shards for name in shard.names}
    total = sum(tensors[name].bytes for name in weight_map)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n")
