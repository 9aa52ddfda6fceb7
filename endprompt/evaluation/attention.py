"""Attention for evaluation: causal by physical index whatever the position ids, over a key/value cache of any length.

The stock `sdpa` of transformers does not serve here. Without a cache it reads a jump in the position ids as the start of
another document (transformers/masking_utils.py, find_packed_sequence_indices); with a cache and no mask it cuts the keys
down to the number of queries (integrations/sdpa_attention.py). A name that is absent from transformers' mask registry
makes it build no mask at all, and this function then decides what a query sees from lengths alone.
"""

from __future__ import annotations

import torch
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

IMPLEMENTATION = "endprompt_cached"
"""The name to give as `attn_implementation`."""


def cached_causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused,
) -> tuple[torch.Tensor, None]:
    """Query i of the newest T tokens sees the S - T cached keys and keys 0..i of its own T.

    query: [batch, heads, T, head_dim]; key, value: [batch, kv_heads, S, head_dim], S >= T, cached keys first.
    Returns [batch, T, heads, head_dim]. Memory beyond the inputs: the keys and values repeated for grouped heads and, where
    no fused kernel knows the lower-right triangle (CPU), a T x S mask.
    """
    if attention_mask is not None:
        raise ValueError(f"{IMPLEMENTATION} decides causality by physical index and takes no mask")
    # Repeated by hand: the memory-efficient CUDA kernel (fp32) takes no grouped heads and would fall back to T x S scores.
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    triangle = causal_lower_right(query.shape[2], key.shape[2])
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=triangle, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, cached_causal_attention)
