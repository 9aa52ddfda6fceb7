"""Which Hugging Face tensors make which Megatron-Core parameter: one literal table and three layouts.

Megatron packs what a tensor-parallel rank multiplies at once, Hugging Face keeps one tensor a projection:

| layout | Megatron parameter                                                  | Hugging Face tensors         |
|--------|---------------------------------------------------------------------|------------------------------|
| copy   | the same tensor                                                     | one                          |
| qkv    | per key/value head g: its query heads, then k_g, then v_g           | q_proj, k_proj, v_proj       |
| gated  | gate over up; *each rank's* part is its gate rows over its up rows  | gate_proj, up_proj           |

Rows of the vocabulary (embedding, output layer) may be followed by padding in Megatron: `Row.vocabulary`. Hugging Face has
none. `source_runs` and `packed_runs` say the same as `join` and `split` in runs of whole rows, so that a converter can move
a tensor of any size through a small buffer.

No rotary permutation is needed: Hugging Face's LLaMA files and Megatron (rotary_interleaved False) both pair dimension i
with i + head_dim / 2. Names are those of `get_gpt_layer_local_spec`; Transformer Engine's spec fuses the norm into the
linear layer behind it (`TRANSFORMER_ENGINE_NAMES`), and Megatron's torch_dist checkpoints use Transformer Engine's names
whichever spec made them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from endprompt.models.architectures import Architecture

Layout = Literal["copy", "qkv", "gated"]
ReadRows = Callable[[str, int, int], torch.Tensor]
"""(Hugging Face name, first row, last row + 1) -> those rows, [rows, ...]; for a vector a row is one number."""


@dataclass(frozen=True)
class Row:
    """One line of the table. `{}` in names stands for the layer. split: dimension that tensor parallelism cuts, or None.

    vocabulary: rows are token ids, and Megatron may add padding rows behind them.
    """

    megatron: str
    huggingface: tuple[str, ...]
    layout: Layout
    split: int | None
    vocabulary: bool = False


_HF = "model.layers.{}."
_MC = "decoder.layers.{}."
TABLE: tuple[Row, ...] = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "copy", 0, vocabulary=True),
    Row(_MC + "input_layernorm.weight", (_HF + "input_layernorm.weight",), "copy", None),
    Row(
        _MC + "self_attention.linear_qkv.weight",
        (_HF + "self_attn.q_proj.weight", _HF + "self_attn.k_proj.weight", _HF + "self_attn.v_proj.weight"),
        "qkv",
        0,
    ),
    Row(_MC + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), "copy", 1),
    Row(_MC + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), "copy", None),
    Row(_MC + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), "gated", 0),
    Row(_MC + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), "copy", 1),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), "copy", None),
    Row("output_layer.weight", ("lm_head.weight",), "copy", 0, vocabulary=True),
)

TRANSFORMER_ENGINE_NAMES = {
    _MC + "self_attention.linear_qkv.layer_norm_weight": _MC + "input_layernorm.weight",
    _MC + "mlp.linear_fc1.layer_norm_weight": _MC + "pre_mlp_layernorm.weight",
}
"""Names under Transformer Engine's layer spec, and in torch_dist checkpoints, to the local spec's."""

_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+")
_HF_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")
_ROWS = {row.megatron: row for row in TABLE}


def row_of(name: str) -> tuple[Row, int | None]:
    """(table row, global layer number) of a Megatron parameter in either spec's naming. KeyError for one not in the table."""
    found = _LAYER.search(name)
    pattern = _LAYER.sub("{}", name)
    return _ROWS[TRANSFORMER_ENGINE_NAMES.get(pattern, pattern)], int(found[0]) if found else None


def huggingface_names(row: Row, layer: int | None) -> tuple[str, ...]:
    return tuple(name.format(layer) for name in row.huggingface)


def megatron_names(architecture: Architecture) -> list[str]:
    """Every parameter of the whole model, local spec's names, in the order of the table. No output layer when tied."""
    names = []
    for row in TABLE:
        if row.megatron == "output_layer.weight" and architecture.tied:
            continue
        names += [row.megatron.format(layer) for layer in range(architecture.layers)] if "{}" in row.megatron else [row.megatron]
    return names


def huggingface_shape(name: str, architecture: Architecture) -> tuple[int, ...]:
    """Shape of a tensor in Hugging Face's files, by the last parts of its name."""
    a = architecture
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    shapes = {
        "embed_tokens": (a.vocab_size, a.hidden_size), "lm_head": (a.vocab_size, a.hidden_size),
        "q_proj": (queries, a.hidden_size), "k_proj": (keys, a.hidden_size), "v_proj": (keys, a.hidden_size),
        "o_proj": (a.hidden_size, queries), "gate_proj": (a.ffn_size, a.hidden_size), "up_proj": (a.ffn_size, a.hidden_size),
        "down_proj": (a.hidden_size, a.ffn_size),
    }  # fmt: skip
    return shapes.get(name.split(".")[-2], (a.hidden_size,))  # norms


def read_parameter(name: str, architecture: Architecture, read: ReadRows, *, tensor_parallel: int = 1, rank: int = 0) -> torch.Tensor:
    """The part of Megatron parameter `name` that tensor-parallel rank `rank` holds, made from rows of Hugging Face tensors.

    Reads only what the rank keeps, except for matrices cut by columns (linear_proj, linear_fc2), whose rows are read whole.
    `tensor_parallel` must divide the key/value heads, the feed-forward width and the vocabulary (`check_layout` sees to it).
    """
    row, layer = row_of(name)
    sources = huggingface_names(row, layer)

    def rows(source: str) -> torch.Tensor:
        """This rank's contiguous share of the rows of `source`."""
        share = huggingface_shape(source, architecture)[0] // tensor_parallel
        return read(source, rank * share, (rank + 1) * share)

    if row.split is None:
        return read(sources[0], 0, huggingface_shape(sources[0], architecture)[0])
    if row.split == 1:
        whole = read(sources[0], 0, huggingface_shape(sources[0], architecture)[0])
        return whole.chunk(tensor_parallel, dim=1)[rank].contiguous()
    return join([rows(source) for source in sources], row.layout, architecture)


def join(parts: Sequence[torch.Tensor], layout: Layout, architecture: Architecture) -> torch.Tensor:
    """Hugging Face tensors, or equal shares of their rows, to Megatron's packed rows."""
    if layout == "qkv":
        q, k, v = (part.reshape(-1, _heads(index, architecture), architecture.head_dim, part.shape[-1]) for index, part in enumerate(parts))
        return torch.cat([q, k, v], dim=1).reshape(-1, parts[0].shape[-1])
    return parts[0] if layout == "copy" else torch.cat(list(parts))


def split(tensor: torch.Tensor, layout: Layout, architecture: Architecture) -> list[torch.Tensor]:
    """The inverse of `join`, for the whole parameter or one rank's part of it."""
    if layout == "qkv":
        per_group = architecture.heads // architecture.kv_heads
        grouped = tensor.reshape(-1, per_group + 2, architecture.head_dim, tensor.shape[-1])
        return [part.reshape(-1, tensor.shape[-1]) for part in grouped.split([per_group, 1, 1], dim=1)]
    return [tensor] if layout == "copy" else list(tensor.chunk(2))


def source_runs(layout: Layout, architecture: Architecture, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(index of the Hugging Face tensor, its first row, number of rows): what makes rows [start, stop) of the packed tensor."""
    blocks = _blocks(layout, architecture)
    if not blocks:
        yield 0, start, stop - start
        return
    period = sum(blocks)
    while start < stop:
        repeat, inside = divmod(start, period)
        index = 0
        while inside >= blocks[index]:
            inside -= blocks[index]
            index += 1
        count = min(blocks[index] - inside, stop - start)
        yield index, repeat * blocks[index] + inside, count
        start += count


def packed_runs(index: int, layout: Layout, architecture: Architecture, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """(first packed row, number of rows): where rows [start, stop) of the index-th Hugging Face tensor lie. Inverse of the above."""
    blocks = _blocks(layout, architecture)
    if not blocks:
        yield start, stop - start
        return
    while start < stop:
        repeat, inside = divmod(start, blocks[index])
        count = min(blocks[index] - inside, stop - start)
        yield repeat * sum(blocks) + sum(blocks[:index]) + inside, count
        start += count


def _blocks(layout: Layout, architecture: Architecture) -> tuple[int, ...]:
    """Rows of each Hugging Face tensor in one period of the packed tensor; empty where the packed tensor is the tensor."""
    a = architecture
    return {"copy": (), "qkv": (a.heads // a.kv_heads * a.head_dim, a.head_dim, a.head_dim), "gated": (a.ffn_size, a.ffn_size)}[layout]


def disk_name(row: Row) -> str:
    """Key of a parameter in a torch_dist checkpoint whose layers are stacked: Transformer Engine's name, no layer number."""
    fused = {local: engine for engine, local in TRANSFORMER_ENGINE_NAMES.items()}
    return fused.get(row.megatron, row.megatron).replace("layers.{}.", "layers.")


def row_of_huggingface(name: str) -> tuple[Row, int | None, int]:
    """(table row, layer, place among the row's tensors) of a Hugging Face tensor. KeyError for one not in the table."""
    found = _HF_LAYER.search(name)
    pattern = _HF_LAYER.sub("{}", name)
    for row in TABLE:
        if pattern in row.huggingface:
            return row, int(found[0]) if found else None, row.huggingface.index(pattern)
    raise KeyError(name)


def _heads(index: int, architecture: Architecture) -> int:
    """Heads of q (0), k (1) or v (2) in one key/value group."""
    return architecture.heads // architecture.kv_heads if index == 0 else 1
