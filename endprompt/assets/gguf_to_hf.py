"""Convert a llama-architecture GGUF file to a Hugging Face checkpoint folder, one tensor at a time.

Source of the formats: llama.cpp `convert_hf_to_gguf.py` (whose renaming and q/k row permutation are undone here) and the
safetensors format. Quantised tensors are dequantised by the `gguf` package. bfloat16 is the default: a Q4_1 block of 32
values has 16 levels, so it is off by up to 1/30 of its range, while rounding to bfloat16 adds at most 2^-9 of a value;
float32 would double the 269 MB of SmolLM2-135M for nothing.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import gguf
import numpy as np
import torch

from endprompt.assets.tokenizer import write_tokenizer
from endprompt.atomic import atomic_directory, write_json
from endprompt.errors import UserError

DType = Literal["bfloat16", "float32"]

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]  # float32


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises KeyError for one that a Llama checkpoint has no place for."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    _, layer, part, suffix = name.split(".") if name.startswith("blk.") and name.count(".") == 3 else ("", "", name, "")
    if suffix != "weight":
        raise KeyError(name)
    return f"model.layers.{int(layer)}.{_BLOCK_NAMES[part]}.weight"


def undo_rope_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from llama.cpp's order to Hugging Face's. weight: [heads * head_dim, hidden].

    llama.cpp rotates adjacent pairs of rows (2i, 2i + 1) of a head, Hugging Face rows (i, i + head_dim / 2): row 2i + j
    there is row j * head_dim / 2 + i here.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, hidden)
    return pairs.swapaxes(1, 2).reshape(rows, hidden)


def convert(source: Path, output: Path, *, dtype: DType = "bfloat16", extra_files: dict[str, bytes] | None = None) -> None:
    """Write `output` with config.json, generation_config.json, model.safetensors and the tokenizer's files.

    extra_files: further files for the folder by name, for instance the licence.
    Raises UserError for a file that is not GGUF or is truncated, for an architecture other than llama, for tensors that a
    Llama checkpoint has no place for (RoPE factors, biases, experts), and for a tokenizer that is not written here.
    The folder appears whole or not at all.
    """
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(source, fields, dtype, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    tensors = list(_tensors(source, reader, config))
    with atomic_directory(output) as folder:
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")})
        write_tokenizer(source, fields, folder, context_length=config["max_position_embeddings"])
        with open(folder / "model.safetensors", "wb") as file:
            _write_safetensors(file, tensors, dtype)
        for name, content in (extra_files or {}).items():
            (folder / name).write_bytes(content)


def _open(source: Path) -> gguf.GGUFReader:
    if not source.is_file():
        raise UserError(source, "no such file", "check the path")
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(source, f"is not a whole GGUF file ({error})", "fetch it again") from error


def _config(source: Path, fields: dict[str, Any], dtype: DType, *, tied: bool) -> dict[str, Any]:
    def need(name: str) -> Any:
        if name not in fields:
            raise UserError(source, f"has no field {name}", "use a GGUF file made from a Hugging Face Llama checkpoint")
        return fields[name]

    if need("general.architecture") != "llama":
        raise UserError(source, f"architecture is {fields['general.architecture']}", "only llama is converted")
    heads, hidden = need("llama.attention.head_count"), need("llama.embedding_length")
    head_dim = need("llama.rope.dimension_count")
    if fields.get("llama.rope.scaling.type", "none") != "none":
        raise UserError(source, "its context is extended already (llama.rope.scaling)", "use the checkpoint before extension")
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(need("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": need("llama.feed_forward_length"),
        "num_hidden_layers": need("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": need("llama.context_length"),
        # 9.999999747e-06 is what float32 makes of 1e-05.
        "rms_norm_eps": float(f"{need('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        # Both spellings: transformers 4.x reads the first, 5.x the second.
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "torch_dtype": dtype,
    }


def _tensors(source: Path, reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[_Tensor]:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        try:
            name = hf_name(tensor.name)
        except KeyError:
            fix = "use a GGUF file of a plain Llama model (no RoPE factors, biases or experts)"
            raise UserError(source, f"holds the tensor {tensor.name}", fix) from None
        shape = tuple(int(size) for size in reversed(tensor.shape))  # GGUF names the fastest dimension first

        yield _Tensor(name, shape, partial(_read, tensor, shape, heads.get(name.split(".")[-2])))


def _read(tensor: gguf.ReaderTensor, shape: tuple[int, ...], permuted_heads: int | None) -> np.ndarray:
    weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return undo_rope_permutation(weight, permuted_heads) if permuted_heads else weight


def _write_safetensors(file: IO[bytes], tensors: list[_Tensor], dtype: DType) -> None:
    """Header, then the tensors in order: memory holds one of them, where safetensors' own `save_file` holds them all."""
    width, code = {"bfloat16": (2, "BF16"), "float32": (4, "F32")}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + width * int(np.prod(tensor.shape))
        header[tensor.name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned to 8 bytes
    file.write(struct.pack("<Q", len(text)) + text)
    for tensor in tensors:
        # A copy: unquantised tensors are views of the read-only file, which torch does not take.
        values = torch.from_numpy(np.array(tensor.read(), dtype=np.float32)).to(getattr(torch, dtype))
        file.write(values.view(torch.uint8).numpy().data)
