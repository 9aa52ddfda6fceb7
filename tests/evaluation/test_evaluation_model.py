"""Loading a checkpoint for evaluation, and forward passes against transformers' eager attention with an explicit mask."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from endprompt.errors import UserError
from endprompt.evaluation import model as model_module
from endprompt.evaluation.attention import cached_causal_attention
from endprompt.evaluation.model import EvaluationModel, load_model, load_tokenizer, read_facts
from endprompt.models.hf_config import extended_config, load_hf_config
from endprompt.rope import RopeScaling

JUMP = torch.cat([torch.arange(30), torch.arange(900, 920)])
"""Positions of an EndPrompt sample: a body, then a terminal segment far away."""


def tokens_of(n: int) -> torch.Tensor:
    return torch.randint(3, 512, (n,), generator=torch.Generator().manual_seed(n))


def logits_of(model: EvaluationModel, hidden: torch.Tensor) -> torch.Tensor:
    return hidden[0] @ model.head.t()


@pytest.mark.parametrize("use_cache", [False, True])
def test_jumped_positions_stay_one_document(model, plain_logits, use_cache):
    tokens = tokens_of(50)
    hidden = model.hidden(tokens[None], JUMP[None], DynamicCache() if use_cache else None)
    torch.testing.assert_close(logits_of(model, hidden), plain_logits(tokens, JUMP), atol=2e-5, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_chunked_prefill_equals_one_pass(model, plain_logits, monkeypatch, chunk):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", chunk)
    tokens = tokens_of(50)
    parts = list(model.stream(tokens[None], JUMP[None], DynamicCache()))
    assert [start for start, _ in parts] == list(range(0, 50, chunk))
    hidden = torch.cat([part for _, part in parts], dim=1)
    torch.testing.assert_close(logits_of(model, hidden), plain_logits(tokens, JUMP), atol=2e-5, rtol=0)


def test_continuing_a_prefilled_cache_equals_one_pass(model, plain_logits):
    tokens = tokens_of(50)
    hidden = model.hidden(tokens[None, 30:], JUMP[None, 30:], model.prefill(tokens[None, :30], JUMP[None, :30]))
    torch.testing.assert_close(logits_of(model, hidden), plain_logits(tokens, JUMP)[30:], atol=2e-5, rtol=0)


def test_attention_refuses_a_mask():
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match="takes no mask"):
        cached_causal_attention(torch.nn.Module(), q, q, q, torch.zeros(1, 1, 2, 2))


def test_score_gives_nll_and_argmax_in_chunks(model, monkeypatch):
    monkeypatch.setattr(model_module, "LOGIT_BYTES", 4 * 512 * 3)  # three rows at a time
    hidden = torch.randn(10, 64, generator=torch.Generator().manual_seed(1))
    logits = (hidden @ model.head.t()).double()
    labels = logits.argmax(dim=1)
    labels[4] = (labels[4] + 1) % 512
    nll, correct = model.score(hidden, labels)
    expected = -logits.log_softmax(dim=1)[torch.arange(10), labels]
    torch.testing.assert_close(nll.double(), expected, atol=1e-5, rtol=0)
    assert correct.tolist() == [i != 4 for i in range(10)]


def test_rope_comes_from_config_json(checkpoint, tmp_path, model):
    extended = shutil.copytree(checkpoint, tmp_path / "extended")
    scaling = RopeScaling("yarn", 10000.0, 16, 8.0, 128)
    (extended / "config.json").write_text(json.dumps(extended_config(load_hf_config(checkpoint), scaling, 1024)))
    facts = read_facts(extended)
    assert (facts.rope, facts.max_positions) == (dataclasses.replace(scaling, attention_factor=facts.rope.attention_factor), 1024)
    stretched = load_model(facts, torch.float32, "cpu")
    tokens = tokens_of(50)
    difference = stretched.hidden(tokens[None], JUMP[None]) - model.hidden(tokens[None], JUMP[None])
    assert difference.abs().max() > 0.01


def test_bf16_keeps_the_frequencies_and_the_head_in_fp32(checkpoint):
    loaded = load_model(read_facts(checkpoint), torch.bfloat16, "cpu")
    assert loaded.decoder.rotary_emb.inv_freq.dtype == loaded.head.dtype == torch.float32
    assert loaded.hidden(tokens_of(5)[None], torch.arange(5)[None]).dtype == torch.bfloat16


def test_rope_that_transformers_reads_differently_is_refused(checkpoint):
    facts = dataclasses.replace(read_facts(checkpoint), rope=RopeScaling("linear", 10000.0, 16, 4.0))
    with pytest.raises(UserError, match="another RoPE"):
        load_model(facts, torch.float32, "cpu")


def test_nan_weights_are_reported(checkpoint, tmp_path):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(read_facts(broken), torch.float32, "cpu")
    with pytest.raises(UserError, match="NaN"):
        loaded.score(loaded.hidden(tokens_of(5)[None], torch.arange(5)[None])[0], tokens_of(5))


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def widen(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 256}))


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "no such checkpoint folder"),
        (lambda folder: (folder / "config.json").unlink(), "not found"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors"),
        (drop_a_weight, r"1 weights are missing, for instance model\.layers\.1\.mlp\.up_proj"),
        (truncate, "cannot be loaded"),
        (widen, "cannot be loaded"),
    ],
)
def test_damaged_checkpoints_give_one_line(checkpoint, tmp_path, damage, message):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(read_facts(folder), torch.float32, "cpu")
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_missing_or_damaged_tokenizer(checkpoint, tmp_path, content):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(folder)
