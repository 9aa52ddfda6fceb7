"""Bytes that elementwise operations move through a GPU's memory, beside its matrix products and attention.

A LLaMA layer's norms, rotations and activations cost little arithmetic and many passes over the hidden states: in eager PyTorch,
by what follows, a fifth of an 8B model's step. No efficiency of the matrix products can stand for that: its share shrinks with the
hidden size and with torch.compile. Each operation is counted as it is written, reads and writes in bytes a number.
"""

from __future__ import annotations

from endprompt.models.architectures import Architecture

HBM_SHARE = 0.92
"""Of the memory's rate, what such a kernel is assumed to reach (as pytorch/ao torchao/testing/training/roofline_utils.py does)."""

BACKWARD = {"eager": 2.33, "compiled": 2.0, "mpt": 2.0}
"""Bytes of a layer's backward pass over those of its forward pass: counted for eager layers, assumed for others."""

LOSS_BYTES = 32
"""A logit, both ways: bf16 to fp32, maximum, exponential, gradient and its cast, about eight passes of fp32."""


def elementwise_bytes(architecture: Architecture, layers: str) -> float:
    """Of one layer's forward pass, a token. layers: eager, compiled, or mpt (eager, with norms that are one kernel, and GELU).

    Eager, as transformers writes it. LlamaRMSNorm: to fp32 (2 + 4), square (4 + 4), mean (4), times the inverse root (4 + 4), to
    bf16 (4 + 2), times the weight (2 + 2). Rotation: times the cosine (2 + 2), half negated (1 + 1) and joined (2 + 2), times the
    sine (2 + 2), sum (4 + 2). Residual sum (4 + 2). silu (2 + 2), times up (4 + 2). Compiled, each of the four is one kernel, and a
    residual sum belongs to the norm after it, which writes both.
    """
    a = architecture
    turned = (a.heads + a.kv_heads) * a.head_dim
    if layers == "eager":
        return 2 * 36 * a.hidden_size + 20 * turned + 2 * 6 * a.hidden_size + 10 * a.ffn_size
    if layers == "compiled":
        return 2 * (4 + 4) * a.hidden_size + 4 * turned + 6 * a.ffn_size
    if layers == "mpt":  # its GELU is over 4 h, and nothing is rotated
        return 2 * 4 * a.hidden_size + 2 * 6 * a.hidden_size + 4 * 4 * a.hidden_size
    raise ValueError(f"layers: {layers!r} is none of eager, compiled, mpt")


def elementwise_seconds(architecture: Architecture, tokens: float, layers: str, *, recomputed: bool, hbm: float) -> float:
    """Of a step's `tokens` on one GPU whose memory moves `hbm` bytes/s."""
    passes = 1 + BACKWARD[layers] + recomputed
    layer = architecture.layers * elementwise_bytes(architecture, layers) * passes
    return tokens * (layer + LOSS_BYTES * architecture.vocab_size) / (HBM_SHARE * hbm)
