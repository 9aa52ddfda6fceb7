"""Attention for training: causal by physical index, whatever the position ids say.

transformers reads position ids as a hint for packed sequences. sdpa, eager and flex (since 4.53) build a mask in which
every step other than +1 begins a new document, so EndPrompt's terminal segment would never see the body; flash attention
switches to a variable-length kernel where ids fall. Both happen without a word, and only without a cache, as in training.

The implementations here have names that transformers' mask registry does not know, so it builds no mask at all; they drop
position_ids and call the stock kernels with is_causal. The rotary phase has been applied by then: positions have done
their work. `probe.py` proves at every start that this holds for the model in hand.
"""

from __future__ import annotations

import importlib.util

import torch
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "endprompt_sdpa"
FLASH = "endprompt_fa2"  # transformers would take a name with "flash" in it for a kernel to fetch


def physical_sdpa(module, query, key, value, attention_mask, **options) -> tuple[torch.Tensor, None]:
    """transformers' sdpa with `is_causal` and neither mask nor position ids.

    query: [batch, heads, n, head_dim]; key, value: [batch, kv_heads, n, head_dim]. Returns [batch, n, heads, head_dim].
    """
    _refuse_mask(attention_mask)
    options.pop("position_ids", None)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **{**options, "is_causal": True})


def physical_flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options) -> tuple[torch.Tensor, None]:
    """flash-attn's dense causal kernel, never the variable-length one. Shapes as in `physical_sdpa`; bf16 or fp16 on a GPU."""
    _refuse_mask(attention_mask)
    from flash_attn import flash_attn_func

    output = flash_attn_func(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), dropout_p=dropout, softmax_scale=scaling, causal=True
    )
    return output, None


def _refuse_mask(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None:
        raise ValueError("samples are full and causal by physical index: pass no attention mask")


AttentionInterface.register(SDPA, physical_sdpa)
AttentionInterface.register(FLASH, physical_flash)


def choose_attention(device: torch.device, precision: str) -> str:
    """flash-attn where it can run (a GPU, bf16, the package installed), else sdpa, whose GPU kernels are also memory-bounded."""
    if device.type == "cuda" and precision == "bf16" and importlib.util.find_spec("flash_attn"):
        return FLASH
    return SDPA
