"""Ways to spoil a checkpoint in a folder that holds hf/ and megatron/: each takes the folder."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

from safetensors.torch import load_file, save_file

HF, MC = "hf", "megatron"
SHARD = f"{HF}/model-00002-of-00004.safetensors"


def retensor(file: str, change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return apply


def add_to_index(name: str, file: str):
    def apply(folder: Path) -> None:
        path = folder / HF / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = file
        path.write_text(json.dumps(index))

    return apply


def repeat_key(folder: Path) -> None:
    """The index lists a tensor twice, in two shards."""
    path = folder / HF / "model.safetensors.index.json"
    path.write_text(path.read_text().replace('"weight_map": {', '"weight_map": {"model.norm.weight": "model-00001-of-00004.safetensors",'))


def two_shards_hold_it(folder: Path) -> None:
    first = f"{HF}/model-00001-of-00004.safetensors"
    name = sorted(load_file(folder / SHARD))[0]
    retensor(first, lambda tensors: tensors.update({name: load_file(folder / SHARD)[name]}))(folder)


def rewrite_header(change):
    """Edit the JSON header of a shard, keeping its length."""

    def apply(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = change(content[8 : 8 + length].decode()).encode()
        assert len(header) <= length
        (folder / SHARD).write_bytes(content[:8] + header.ljust(length) + content[8 + length :])

    return apply


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def hostile_metadata(folder: Path) -> None:
    (folder / MC / ".metadata").write_bytes(pickle.dumps({"state_dict_metadata": Exploit()}))


def hostile_blob(folder: Path) -> None:
    """A tensor whose pickle runs a command; checksums and sizes are right."""
    with open(folder / MC / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    index, info = next((index, info) for index, info in metadata.storage_data.items() if index.fqn == "output_layer.weight")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Exploit(), protocol=2))
        archive.writestr("archive/data/0", bytes(512 * 64 * 2))
        archive.writestr("archive/version", "3\n")
    with open(folder / MC / info.relative_path, "ab") as file:
        start = file.tell()
        file.write(buffer.getvalue())
    metadata.storage_data[index] = type(info)(info.relative_path, start, len(buffer.getvalue()))
    (folder / MC / ".metadata").write_bytes(pickle.dumps(metadata))


def edit_metadata(change):
    def apply(folder: Path) -> None:
        path = folder / MC / ".metadata"
        metadata = pickle.loads(path.read_bytes())
        change(metadata)
        path.write_bytes(pickle.dumps(metadata))

    return apply


def outside(metadata) -> None:
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path


def add_bias(metadata) -> None:
    weight = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    metadata.state_dict_metadata["decoder.layers.self_attention.linear_qkv.bias"] = weight


def lose_a_layer(metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.pop()


def overlapping(metadata) -> None:
    chunks = metadata.state_dict_metadata["embedding.word_embeddings.weight"].chunks
    chunks.append(chunks[0])
