"""A tiny checkpoint, its tokenizer, text to read, and a reference forward that shares nothing with the code under test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt.evaluation.model import load_model, load_tokenizer, read_facts
from tests.support.tiny import make_tiny_checkpoint

PARAGRAPH = """
Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and nothing
particular to interest me on shore, I thought I would sail about a little and see the watery part of the world. It is a
way I have of driving off the spleen and regulating the circulation. Whenever I find myself growing grim about the mouth,
then, I account it high time to get to sea as soon as I can. This is my substitute for pistol and ball. With a
philosophical flourish Cato throws himself upon his sword; I quietly take to the ship. There is nothing surprising in
this. If they but knew it, almost all men in their degree, some time or other, cherish very nearly the same feelings
towards the ocean with me.
"""
"""The beginning of Moby Dick (public domain)."""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("evaluation") / "tiny"
    make_tiny_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def model(checkpoint):
    return load_model(read_facts(checkpoint), torch.float32, "cpu")


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    return load_tokenizer(checkpoint)


@pytest.fixture(scope="session")
def novel(tmp_path_factory) -> Path:
    """Some 5000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "novel.txt"
    path.write_text("\n\n".join(f"Chapter {n}. {PARAGRAPH.strip()}" for n in "abcdefgh"), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def plain_logits(checkpoint):
    """logits(tokens [n], position_ids [n]) -> [n, V]: transformers' eager attention, one pass, an explicit lower triangle."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()

    @torch.no_grad()
    def logits(tokens: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        n = len(tokens)
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        return reference(input_ids=tokens[None], position_ids=position_ids[None], attention_mask=mask, use_cache=False).logits[0]

    return logits
