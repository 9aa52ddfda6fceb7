"""Checkpoints on disk: Hugging Face safetensors, Megatron's parameters, and the literal table between them."""
