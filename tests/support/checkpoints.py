"""Tiny checkpoints of every supported family for the conversion tests."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.tiny import make_tiny_tokenizer

_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES: dict[str, dict] = {
    "llama2 (MHA)": {"num_key_value_heads": 4, "rope_theta": 10000.0, "dtype": torch.float32},
    "llama3 (GQA)": {"rope_theta": 500000.0, "dtype": torch.bfloat16},
    "llama3.1": {"rope_theta": 500000.0, "rope": _LLAMA3_ROPE, "max_position_embeddings": 131072, "dtype": torch.bfloat16},
    "llama3.2 (tied)": {
        "rope_theta": 500000.0, "rope": {**_LLAMA3_ROPE, "factor": 32.0}, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "dtype": torch.float32,
    },
    "mistral (wide heads)": {"mistral": True, "rope_theta": 1000000.0, "head_dim": 32, "dtype": torch.float32},
    "smollm2 (3 of 9 heads)": {
        "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "rope_theta": 100000.0,
        "dtype": torch.bfloat16,
    },
    "llama (fp16, odd sizes)": {"vocab_size": 509, "intermediate_size": 97, "num_hidden_layers": 3, "dtype": torch.float16},
}  # fmt: skip
"""Fields of the config, over a model of 4 layers, width 64, 4 query and 2 key/value heads, untied."""


def make_family(name: str, folder: Path, *, max_shard_size: str = "150KB", seed: int = 0, **overrides) -> Path:
    """Save the family's checkpoint, random weights of std 0.2, in several shards. Returns `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    fields = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, **FAMILIES[name], **overrides,
    }  # fmt: skip
    dtype, rope, theta = fields.pop("dtype"), fields.pop("rope", {"rope_type": "default"}), fields.pop("rope_theta")
    fields["rope_parameters"] = {**rope, "rope_theta": theta}
    if fields.pop("mistral", False):
        kinds, fields["sliding_window"] = (MistralConfig, MistralForCausalLM), None
    else:
        kinds = (LlamaConfig, LlamaForCausalLM)
    torch.manual_seed(seed)
    model = kinds[1](kinds[0](**fields))
    with torch.no_grad():
        for name_, parameter in model.named_parameters():
            if "norm" in name_:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # all ones would hide a swap of two norms
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    make_tiny_tokenizer(folder, vocab_size=min(500, fields["vocab_size"]))
    return folder
