"""Facts of the supported checkpoints and their Hugging Face configuration files."""
