"""Perplexity by position and the physical needle test against naive full forwards."""

import math

import pytest
import torch

from endprompt.errors import UserError
from endprompt.evaluation import model as model_module
from endprompt.evaluation.needle import NeedleSettings, build_cases, measure_needle
from endprompt.evaluation.perplexity import PerplexitySettings, bucket_edges, choose_windows, measure_perplexity
from endprompt.evaluation.text import Filler, encode, read_documents


def test_buckets_equal_a_naive_full_forward(model, tokenizer, novel, plain_logits, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 64)
    settings = PerplexitySettings(length=300, stride=150, windows=3, bucket=100)
    windows = choose_windows(tokenizer, read_documents([str(novel)]), settings)
    result = measure_perplexity(model, windows, settings, "tiny")

    nll = []
    for _, ids in windows:
        tokens = torch.tensor(ids)
        nll.append(torch.nn.functional.cross_entropy(plain_logits(tokens, torch.arange(300))[:-1], tokens[1:], reduction="none"))
    nll = torch.stack(nll)  # [3, 299]: column i is position i + 1
    for row, (start, end) in zip(result["buckets"], [(0, 100), (100, 200), (200, 300)], strict=True):
        expected = nll[:, max(start, 1) - 1 : end - 1]
        assert (row["start"], row["end"], row["tokens"]) == (start, end, expected.numel())
        assert row["nll"] == pytest.approx(expected.mean().item(), abs=2e-5)
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
    assert result["nll"] == pytest.approx(nll.mean().item(), abs=2e-5) and result["windows"] == 3


def test_edges():
    assert bucket_edges(2048, None) == [0, 256, 362, 512, 724, 1024, 1448, 2048]
    assert bucket_edges(2100, None)[-2:] == [1448, 2100]  # no bucket of 52 positions
    assert bucket_edges(3000, None)[-2:] == [2048, 3000][-2:] and bucket_edges(100, None) == [0, 100]
    assert bucket_edges(1000, 300) == [0, 300, 600, 1000] and bucket_edges(1000, 400) == [0, 400, 800, 1000][:3] + [1000]
    assert bucket_edges(300, 1000) == [0, 300]


def test_windows_slide_within_documents_and_spread_over_them(tokenizer, novel, tmp_path):
    second = tmp_path / "second.txt"
    second.write_text(novel.read_text()[4000:12000])
    documents = read_documents([str(novel), str(second)])
    ids = {d.name: encode(tokenizer, d.text) for d in documents}
    everything = choose_windows(tokenizer, documents, PerplexitySettings(500, 250, 10**6))
    starts = {d.name: list(range(0, len(ids[d.name]) - 499, 250)) for d in documents}
    assert everything == [(name, ids[name][s : s + 500]) for name in ids for s in starts[name]]
    few = choose_windows(tokenizer, documents, PerplexitySettings(500, 250, 4))
    assert len(few) == 4 and {name for name, _ in few} == {"novel.txt", "second.txt"} and all(w in everything for w in few)


def test_text_shorter_than_the_window(tokenizer, novel):
    with pytest.raises(UserError, match="longest document has .* tokens; give a document of 90000"):
        choose_windows(tokenizer, read_documents([str(novel)]), PerplexitySettings(90000, 100, 1))


def test_needle_equals_a_naive_full_forward(model, tokenizer, novel, plain_logits, monkeypatch):
    monkeypatch.setattr(model_module, "PREFILL_CHUNK", 100)
    settings = NeedleSettings(lengths=(400, 700), depths=(0.0, 0.9), cases=2, seed=3)
    cases = build_cases(tokenizer, Filler(read_documents([str(novel)])), settings)
    result = measure_needle(model, cases, "tiny")
    assert [(c["length"], c["depth"]) for c in result["cells"]] == [(400, 0.0), (400, 0.9), (700, 0.0), (700, 0.9)]
    for cell in result["cells"]:
        for case, nll in zip(cases[cell["length"], cell["depth"]], cell["case_nll"], strict=True):
            tokens = torch.tensor(case.context + case.question + case.answer)
            assert cell["length"] - 40 < len(tokens) <= cell["length"]
            predicting = plain_logits(tokens, torch.arange(len(tokens)))[-len(case.answer) - 1 : -1]
            assert nll == pytest.approx(torch.nn.functional.cross_entropy(predicting, torch.tensor(case.answer)).item(), abs=2e-5)


def test_needle_length_too_short_for_its_question(tokenizer):
    with pytest.raises(UserError, match="--needle-lengths: 60 is too short"):
        build_cases(tokenizer, Filler(None), NeedleSettings((60,), (0.5,), 1, 0))
