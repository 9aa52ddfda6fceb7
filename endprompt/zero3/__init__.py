"""The DeepSpeed ZeRO-3 engine: loading, attention, probe, training loop, checkpoints and Hugging Face export."""
