"""Needle-retrieval cases: a context with one fact hidden in it, a question, and the answer that stands in the fact.

Shared by the distance probe (short context, assigned distance) and the physical needle test (long context). A plain
completion template, no chat format, so that base models can be measured: the question's last words repeat the fact's
first words, and the model has to go on as the fact did.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from endprompt.errors import UserError
from endprompt.evaluation.text import Filler, encode, prefix_tokens

KEYS = (
    "Paris", "London", "Tokyo", "Cairo", "Lima", "Oslo", "Berlin", "Madrid", "Rome", "Vienna", "Dublin", "Athens",
    "Lisbon", "Moscow", "Delhi", "Boston", "Chicago", "Toronto", "Sydney", "Nairobi", "Havana", "Prague", "Warsaw", "Seoul",
)  # fmt: skip
WORDS = (
    "elephant", "lantern", "violin", "pepper", "castle", "marble", "rocket", "tulip", "hammer", "walnut", "dolphin", "compass",
    "pillow", "copper", "falcon", "ginger", "harbor", "island", "jacket", "kettle", "lemon", "mirror", "needle", "orchid",
)  # fmt: skip

_SLACK = 8
"""Tokens by which a count may change when texts are joined, because their neighbours are split differently."""


@dataclass(frozen=True)
class RetrievalCase:
    """Token ids of one case. Every answer token stands once in the context, from index `needle` on.

    context: exactly the length asked for, with the tokenizer's prefix (`<s>`) if it has one; question: what follows it up
    to the answer; answer: the value, without a separate blank before it.
    """

    context: list[int]
    question: list[int]
    answer: list[int]
    needle: int


class CaseBuilder:
    """Cases that are a pure function of (seed, index, context_length, depth), the filler text and the tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, filler: Filler, seed: int):
        self.tokenizer, self.filler, self.seed = tokenizer, filler, seed
        self.prefix = prefix_tokens(tokenizer)
        questions = [_question(kind, key) for kind in ("number", "word") for key in KEYS]
        answers = [" 8888888", *(f" {word}" for word in WORDS)]
        self.question_room = _SLACK + sum(max(len(encode(tokenizer, text)) for text in texts) for texts in (questions, answers))
        """Tokens that no question with its answer exceeds, for any index."""

    def __call__(self, index: int, context_length: int, depth: float) -> RetrievalCase:
        """Case `index` with `context_length` tokens before the question and the fact at `depth` of them (0 start, 1 end).

        Even indices ask for a seven-digit number, odd ones for a word. Raises UserError when the filler is too short.
        """
        rng = random.Random(f"{self.seed}/{index}")  # a string seed is hashed with sha512: equal on every machine
        key = KEYS[index % len(KEYS)]
        kind, value = ("number", str(rng.randrange(10**6, 10**7))) if index % 2 == 0 else ("word", rng.choice(WORDS))
        needle, question = f"The magic {kind} for {key} is {value}.", _question(kind, key)

        room = context_length - len(self.prefix) - len(encode(self.tokenizer, " " + needle)) - _SLACK
        before, after = self._filler(rng, room, depth)
        context = " ".join(part for part in (before, needle, after) if part)
        value_in_needle = len(before) + bool(before) + needle.rindex(value)
        whole = f"{context}{question} {value}"
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]

        # Tokens are told apart by characters after splitting the whole text once, so each is what the model would meet.
        asked = next(i for i, (start, _) in enumerate(spans) if start >= len(context))
        answered = next(i for i, (_, end) in enumerate(spans) if end > len(whole) - len(value))
        copied = next(i for i, (_, end) in enumerate(spans) if end > value_in_needle)
        dropped = asked - (context_length - len(self.prefix))
        if dropped < 0 or copied < dropped:
            raise RuntimeError(f"case {index}: the fact lies outside its context (dropped {dropped}, fact at {copied})")
        return RetrievalCase(
            context=self.prefix + ids[dropped:asked],
            question=ids[asked:answered],
            answer=ids[answered:],
            needle=len(self.prefix) + copied - dropped,
        )

    def _filler(self, rng: random.Random, tokens: int, depth: float) -> tuple[str, str]:
        """At least `tokens` tokens of filler in two parts, cut at the end of a sentence `depth` along the last `tokens` of them."""
        # English has some 4 characters a token; 8 leaves room for other text.
        text = " ".join(self.filler.sample(rng, 8 * tokens))
        spans = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        needed = tokens + 2 * _SLACK
        if len(spans) < needed:
            raise UserError(
                "--text", f"holds {len(spans)} tokens, a context needs {needed}", "give more or longer text, or a shorter length"
            )
        start, first = spans[-needed][0], spans[-tokens][0]
        cuts = [first, *(i + 1 for i in range(first, len(text) - 1) if text[i] in ".!?" and text[i + 1] == " "), len(text)]
        cut = min(cuts, key=lambda c: abs(c - first - depth * (len(text) - first)))
        return text[start:cut].strip(), text[cut:].strip()


def _question(kind: str, key: str) -> str:
    return f"\n\nQuestion: What is the magic {kind} for {key}? Answer: The magic {kind} for {key} is"


def fingerprint(cases: list[RetrievalCase]) -> str:
    """Equal for two results exactly when they were measured on the same tokens, so that they may be compared case by case."""
    facts = [[c.context, c.question, c.answer, c.needle] for c in cases]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
