"""Terminal prompts as tokens: a weighted set from which every sample draws one (the e of paper eq. 4 and 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from endprompt.errors import UserError
from endprompt.recipe.schema import Positions, RecallPrompt, TextPrompt

KNOWN_LENGTHS = {
    "This is the end of text, please pay attention here": {"llama3": 11, "llama2": 11, "mistral": 11, "smollm2": 11},
    "<|eot_id|>": {"llama3": 1, "llama2": 8, "mistral": 8, "smollm2": 8},  # a special token of Llama-3 only
    "End.": {"llama3": 2, "llama2": 2, "mistral": 2, "smollm2": 2},
    "\n\nFrom the text above:": {"llama2": 8, "smollm2": 7},
}
"""Tokens of the built-in texts by tokenizer family, counted with each family's tokenizer and add_special_tokens=False.

For looking at positions where no tokenizer is at hand; training always counts with the checkpoint's own tokenizer.
"""


@dataclass(frozen=True)
class Prompt:
    """One tokenised prompt.

    words: int64 [w], w >= 1: the tokens of a text prompt, or the cue of a recall prompt.
    spans: 0 for a text prompt; else the prompt is `spans` times (words, then `span_length` tokens quoted from the body).
    weight: how often it is drawn, relative to the others of the set.
    """

    name: str
    words: np.ndarray
    weight: float = 1.0
    spans: int = 0
    span_length: int = 0

    @property
    def length(self) -> int:
        """Tokens that the prompt takes at the end of a sample: b of paper eq. 4."""
        return len(self.words) if not self.spans else self.spans * (len(self.words) + self.span_length)

    def write(self, body: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The prompt's tokens (int64 [length]) and which of them can be predicted (bool [length]).

        A span is quoted from an offset uniform in [0, len(body) - span_length], in the body's own token ids. Nothing
        before it tells which span is quoted, so its first token is marked unpredictable: its loss is the entropy of the
        text's unigrams, several nats that no weight can lower, against near 0 for the tokens copied after it.
        """
        if not self.spans:
            return self.words, np.ones(len(self.words), dtype=bool)
        offsets = rng.integers(0, len(body) - self.span_length, size=self.spans, endpoint=True)
        tokens = np.concatenate([part for at in offsets for part in (self.words, body[at : at + self.span_length])])
        predictable = np.ones(self.length, dtype=bool)
        predictable[len(self.words) :: len(self.words) + self.span_length] = False
        return tokens, predictable


@dataclass(frozen=True)
class PromptTokens:
    """A tokenised prompt set."""

    prompts: tuple[Prompt, ...]

    def draw(self, rng: np.random.Generator) -> Prompt:
        """One prompt, with probability proportional to its weight."""
        cumulative = np.cumsum([prompt.weight for prompt in self.prompts])
        at = np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right")
        return self.prompts[min(int(at), len(self.prompts) - 1)]  # the product can round up to the last edge


def words_of(prompt: TextPrompt | RecallPrompt) -> str:
    """The words of a recipe's prompt that a tokenizer counts: the text, or the cue of a recall prompt."""
    return prompt.text if isinstance(prompt, TextPrompt) else prompt.cue


def tokenized(prompt: TextPrompt | RecallPrompt, words: np.ndarray) -> Prompt:
    """A recipe's prompt with its words as tokens (int64 [w])."""
    quotes = {"spans": prompt.spans, "span_length": prompt.span_length} if isinstance(prompt, RecallPrompt) else {}
    return Prompt(name=prompt.name, words=words, weight=prompt.weight, **quotes)


def tokenize_prompts(positions: Positions, tokenizer: Any) -> PromptTokens:
    """Tokenise the recipe's prompts with any Hugging Face tokenizer, without special tokens around them.

    Raises UserError for a prompt that comes out as no token at all.
    """
    prompts = []
    for prompt in positions.prompts:
        ids = tokenizer(words_of(prompt), add_special_tokens=False)["input_ids"]
        if not len(ids):
            raise UserError(
                f"positions.prompts: {prompt.name}", f"{words_of(prompt)!r} is no token for this tokenizer", "write other words"
            )
        prompts.append(tokenized(prompt, np.asarray(ids, dtype=np.int64)))
    return PromptTokens(tuple(prompts))
