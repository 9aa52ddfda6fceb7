"""Small corpora of documents with words that the tiny tokenizer knows, and some that it must spell in bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.support.tiny import PARAGRAPH


def make_texts(count: int, seed: int = 0, longest: int = 300) -> list[str]:
    """Documents of 1 to `longest` words."""
    rng = np.random.default_rng(seed)
    words = [*PARAGRAPH.split(), "Ünïcödé", "漢字", "🙂", "\n\n"]
    return [" ".join(rng.choice(words, size=rng.integers(1, longest + 1))) + "." for _ in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)), encoding="utf-8")
    return path
