"""Checkpoints of any size that take no disk: safetensors whose numbers are a hole in the file, and outputs that keep only headers."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from endprompt.checkpoint import conversion, digests
from endprompt.checkpoint.companions import plan_shards, shard_name
from endprompt.checkpoint.safetensors_files import TensorInfo, make_header
from endprompt.checkpoint.views import tensors_of_huggingface
from endprompt.checkpoint.weights import INDEX
from endprompt.models.architectures import Architecture, architecture_of_config

LLAMA3_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
}  # fmt: skip


def make_sparse_checkpoint(folder: Path, shard_gb: float = 5.0, **changes) -> Architecture:
    """A bf16 checkpoint of zeros with the shapes of LLAMA3_70B and `changes`; only headers and config take disk."""
    folder.mkdir(parents=True)
    config = {**LLAMA3_70B, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    architecture = architecture_of_config(config)
    tensors = {name: TensorInfo(shape, "BF16") for name, shape in tensors_of_huggingface(architecture).items()}
    plan = plan_shards([(name, info.bytes) for name, info in tensors.items()], shard_gb * 1e9)
    weight_map = {}
    for number, shard in enumerate(plan):
        header, _ = make_header({name: tensors[name] for name, _ in shard}, {"format": "pt"})
        path = folder / shard_name(number, len(plan))
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(size for _, size in shard))
        weight_map |= dict.fromkeys((name for name, _ in shard), path.name)
    if len(plan) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return architecture


class _NoDigest:
    def update(self, data) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


def drop_numbers() -> None:
    """From now on blocks of numbers are neither hashed nor written in this process: the file grows by a hole instead."""
    digests._MAKERS[digests.ALGORITHM] = _NoDigest
    write, alone = conversion.Files.write, threading.Lock()

    def write_small(self, name, offset, data):
        descriptor = self.descriptor(name)
        with alone:  # a write between fstat and ftruncate that made the file longer would be cut off again
            if len(data) < 2**18:
                write(self, name, offset, data)
            elif os.fstat(descriptor).st_size < offset + len(data):
                os.ftruncate(descriptor, offset + len(data))

    conversion.Files.write = write_small
    conversion._check_disk = lambda *arguments: None
