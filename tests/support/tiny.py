"""Tiny checkpoints of the real architectures, made on the spot: random weights, a BPE tokenizer trained on a paragraph."""

from __future__ import annotations

from pathlib import Path

import torch

PARAGRAPH = (
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was the "
    "epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness. This is the end "
    "of text, please pay attention here. End. From the text above: the quick brown fox jumps over the lazy dog 0123456789."
)


def make_tiny_tokenizer(directory: Path, vocab_size: int = 512) -> None:
    """Write tokenizer.json and its settings: byte-level BPE with <s>, </s> and <|eot_id|>, every byte known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PARAGRAPH], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=128)
    fast.save_pretrained(directory)


def make_tiny_checkpoint(
    directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **overrides
) -> None:
    """Save a LLaMA of 3 layers, width 64, 4 query and 2 key/value heads, untied, with generation config and tokenizer.

    overrides: fields of LlamaConfig. Weights are large enough (std 0.2) that positions move the loss visibly.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0, "initializer_range": 0.2,
        "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    make_tiny_tokenizer(directory)
