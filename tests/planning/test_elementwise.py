"""Bytes of elementwise operations against what transformers' own LLaMA layer reads and writes, counted operation by operation."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from endprompt.models.architectures import Architecture
from endprompt.planning.elementwise import BACKWARD, HBM_SHARE, LOSS_BYTES, elementwise_bytes, elementwise_seconds
from endprompt.rope import RopeScaling

PRODUCTS = {"mm", "addmm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable"}
TOKENS = 128


class CountBytes(TorchDispatchMode):
    """Read and written by every operation that is neither a product nor a view; a tensor broadcast counts once."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        read, written = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in ((arguments, keywords), found))
        storages = {tensor.untyped_storage().data_ptr() for tensor in read}
        view = all(tensor.untyped_storage().data_ptr() in storages for tensor in written)
        if not view and function.overloadpacket.__name__ not in PRODUCTS:
            self.total += sum(tensor.numel() * tensor.element_size() for tensor in read + written)
        return found


@pytest.mark.parametrize("shape", [(256, 704, 8, 2), (512, 1024, 8, 8)])
def test_eager_is_what_transformers_layer_moves(shape):
    hidden, ffn, heads, kv_heads = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=kv_heads,
        attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    stream = torch.randn(1, TOKENS, hidden, dtype=torch.bfloat16, requires_grad=True)
    turns = LlamaRotaryEmbedding(config)(stream, torch.arange(TOKENS)[None])
    with CountBytes() as forward:
        output = layer(stream, position_embeddings=turns, attention_mask=None)
    with CountBytes() as backward:
        output.backward(torch.randn_like(output))
    expected = elementwise_bytes(architecture(hidden, ffn, heads, kv_heads), "eager")
    print(
        f"forward {forward.total / TOKENS:.0f} bytes a token, expected {expected}; backward {backward.total / forward.total:.3f} times that"
    )
    assert expected == pytest.approx(forward.total / TOKENS, rel=0.03)
    assert BACKWARD["eager"] == pytest.approx(backward.total / forward.total, rel=0.03)


def architecture(hidden: int, ffn: int, heads: int, kv_heads: int) -> Architecture:
    rope = RopeScaling("none", 10000.0, hidden // heads)
    return Architecture("a", 2, hidden, ffn, heads, kv_heads, hidden // heads, 1000, 128, rope)


def test_seconds_are_bytes_over_the_rate_that_is_reached():
    a = architecture(256, 704, 8, 2)
    once = elementwise_bytes(a, "eager")
    found = elementwise_seconds(a, 10, "eager", recomputed=True, hbm=2e12)
    assert found == pytest.approx(10 * (2 * (1 + 2.33 + 1) * once + LOSS_BYTES * 1000) / (HBM_SHARE * 2e12))
    assert elementwise_bytes(a, "compiled") < once / 2
    with pytest.raises(ValueError, match="none of eager, compiled, mpt"):
        elementwise_bytes(a, "triton")
