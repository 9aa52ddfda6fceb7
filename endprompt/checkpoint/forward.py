"""Logits of a checkpoint in fp32, one layer in memory at a time, so that a 70B model can be asked on a login node.

Two implementations on purpose. A Hugging Face folder runs through transformers' own layers and rotary embedding, made from
its config.json. A Megatron checkpoint runs through Megatron's conventions, written out here from how its attention cuts
linear_qkv and its MLP linear_fc1; no function of the conversion is used but the reader. Attention is causal by physical
order in both, whatever the positions.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch.nn import functional

from endprompt.checkpoint.torch_dist import TorchDistCheckpoint
from endprompt.checkpoint.views import TensorReader, read_tensor
from endprompt.models.architectures import Architecture
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies

HEAD_ROWS = 8192
"""Rows of the output layer taken at a time."""


@torch.no_grad()
def huggingface_logits(reader: TensorReader, config: dict[str, Any], tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 [length, vocabulary]. tokens, positions: int64 [length]."""
    kind = config["model_type"]
    modeling = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    prefix = {"llama": "Llama", "mistral": "Mistral"}[kind]
    settings = getattr(modeling, f"{prefix}Config").from_dict(config)
    settings._attn_implementation = "eager"
    rotary = getattr(modeling, f"{prefix}RotaryEmbedding")(settings)
    layer = getattr(modeling, f"{prefix}DecoderLayer")(settings, 0).float().eval()
    norm = getattr(modeling, f"{prefix}RMSNorm")(settings.hidden_size, eps=settings.rms_norm_eps)
    length = len(tokens)
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    hidden = _embed(reader, "model.embed_tokens.weight", tokens)[None]
    turned = rotary(hidden, positions[None])
    for number in range(settings.num_hidden_layers):
        own = f"model.layers.{number}."
        for name, parameter in layer.named_parameters():
            parameter.copy_(read_tensor(reader, own + name))
        out = layer(hidden, attention_mask=mask, position_ids=positions[None], position_embeddings=turned)
        hidden = out[0] if isinstance(out, tuple) else out
    norm.weight.copy_(read_tensor(reader, "model.norm.weight"))
    head = "model.embed_tokens.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return _head(reader, head, norm(hidden)[0], settings.vocab_size)


@torch.no_grad()
def megatron_logits(
    checkpoint: TorchDistCheckpoint,
    architecture: Architecture,
    rope: RopeScaling,
    epsilon: float,
    tokens: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """fp32 [length, vocabulary]. tokens, positions: int64 [length]. epsilon: of the norms."""
    a = architecture
    angles = positions.float()[:, None] * inverse_frequencies(rope)
    scale = attention_factor(rope)
    cos, sin = (torch.cat([part, part], -1)[:, None] * scale for part in (angles.cos(), angles.sin()))

    def turn(x: torch.Tensor) -> torch.Tensor:
        """[length, heads, head_dim]: dimension i is paired with i + head_dim / 2."""
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat([-high, low], -1) * sin

    def weight(name: str) -> torch.Tensor:
        return read_tensor(checkpoint, name).float()

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.rms_norm(x, x.shape[-1:], weight(name), epsilon)

    hidden = _embed(checkpoint, "embedding.word_embeddings.weight", tokens)
    length, per_group = len(tokens), a.heads // a.kv_heads
    for number in range(a.layers):
        own = f"decoder.layers.{number}."
        mixed = functional.linear(norm(hidden, own + "input_layernorm.weight"), weight(own + "self_attention.linear_qkv.weight"))
        mixed = mixed.view(length, a.kv_heads, (per_group + 2) * a.head_dim)
        q, k, v = mixed.split([per_group * a.head_dim, a.head_dim, a.head_dim], dim=-1)
        q, k = turn(q.reshape(length, a.heads, a.head_dim)), turn(k).repeat_interleave(per_group, 1)
        v = v.repeat_interleave(per_group, 1)
        attended = functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), is_causal=True)
        attended = attended.transpose(0, 1).reshape(length, -1)
        hidden = hidden + functional.linear(attended, weight(own + "self_attention.linear_proj.weight"))
        gate, up = functional.linear(norm(hidden, own + "pre_mlp_layernorm.weight"), weight(own + "mlp.linear_fc1.weight")).chunk(2, -1)
        hidden = hidden + functional.linear(functional.silu(gate) * up, weight(own + "mlp.linear_fc2.weight"))
    name = "embedding.word_embeddings.weight" if a.tied else "output_layer.weight"
    return _head(checkpoint, name, norm(hidden, "decoder.final_layernorm.weight"), a.vocab_size)


def _embed(reader: TensorReader, name: str, tokens: torch.Tensor) -> torch.Tensor:
    return torch.cat([read_tensor(reader, name, token, token + 1) for token in tokens.tolist()]).float()


def _head(reader: TensorReader, name: str, hidden: torch.Tensor, vocabulary: int) -> torch.Tensor:
    parts = []
    for start in range(0, vocabulary, HEAD_ROWS):
        rows = read_tensor(reader, name, start, min(vocabulary, start + HEAD_ROWS)).float()
        parts.append(functional.linear(hidden, rows))
    return torch.cat(parts, -1)


def sample_positions(target_length: int, spans: int = 4, span: int = 12) -> torch.Tensor:
    """int64 [spans * span]: `spans` runs of consecutive positions, the first at 0 and the last up to target_length - 1."""
    span = min(span, max(1, target_length // spans))
    starts = [round(k * (target_length - span) / (spans - 1)) for k in range(spans)]
    return torch.cat([torch.arange(start, start + span) for start in starts])


def relative_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|a - b| / |b| of every position, [length]; logits are centred first, as a constant added to them changes nothing."""
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    return (a - b).norm(dim=-1) / b.norm(dim=-1)
