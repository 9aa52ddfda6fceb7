"""Position schemes: how `physical_length` tokens of text get position ids anywhere in [0, target_length)."""

from endprompt.positions.builder import SampleBuilder
from endprompt.positions.prompts import Prompt, PromptTokens, tokenize_prompts
from endprompt.positions.sample import Sample

__all__ = ["Prompt", "PromptTokens", "Sample", "SampleBuilder", "tokenize_prompts"]
