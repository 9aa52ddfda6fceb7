"""Attention and norm of the local layers against plain formulae. Context parallelism is in test_layouts.py, over real ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from megatron_patches.batches import context_slice
from megatron_patches.modules import CausalAttention, RMSNorm
from tests.support.one_rank import one_rank_world, stock_model


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank_world():
        yield


def plain_attention(query, key, value):
    """[s, b, h, d], queries being the last of the keys; scores, mask, softmax and sum written out in float64."""
    repeat = query.shape[2] // key.shape[2]
    q, k, v = query.double(), key.double().repeat_interleave(repeat, 2), value.double().repeat_interleave(repeat, 2)
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) / math.sqrt(query.shape[-1])
    late = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
    weights = scores.masked_fill(late, float("-inf")).softmax(-1)
    return torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)


@pytest.mark.parametrize("queries, keys", [(12, 12), (6, 12), (3, 9)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_causal_attention(queries, keys, groups):
    attention = stock_model(attention=CausalAttention).decoder.layers[0].self_attention.core_attention
    draw = torch.Generator().manual_seed(queries + groups)
    query = torch.randn(queries, 2, 4, 16, generator=draw, requires_grad=True)
    key, value = (torch.randn(keys, 2, groups, 16, generator=draw, requires_grad=True) for _ in range(2))
    weight = torch.randn(queries, 2, 64, generator=draw)
    out = attention._attend(query, key, value)
    expected = plain_attention(query, key, value)
    assert (out - expected).abs().max() < 1e-5
    got = torch.autograd.grad((out * weight).sum(), (query, key, value))
    want = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for one, other in zip(got, want, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_equals_upstreams_core_attention():
    """The same model with upstream's DotProductAttention, which needs the mask that ours does not read."""
    tokens, positions = torch.randint(0, 128, (2, 20), generator=torch.Generator().manual_seed(1)), torch.arange(20).repeat(2, 1)
    hidden = torch.ones(20, 20, dtype=torch.bool).triu(1)[None, None]
    upstream, ours = stock_model(), stock_model(attention=CausalAttention)
    assert (ours(tokens, positions, None) - upstream(tokens, positions, hidden)).abs().max() < 1e-4


def test_dropout_and_bias_are_refused():
    with pytest.raises(ValueError, match="dropout"):
        stock_model(attention=CausalAttention, attention_dropout=0.1)
    attention = stock_model(attention=CausalAttention).decoder.layers[0].self_attention.core_attention
    part = torch.zeros(4, 1, 4, 16)
    with pytest.raises(ValueError, match="bias"):
        attention(part, part, part, attention_bias=torch.zeros(1))


def test_norm_equals_the_formula_and_carries_its_mark():
    config = stock_model().config
    norm = RMSNorm(config, 64, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    hidden = torch.randn(5, 2, 64)
    expected = hidden.double() / (hidden.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.double()
    assert (norm(hidden) - expected).abs().max() < 1e-5
    assert norm.weight.sequence_parallel is False
    config.sequence_parallel = True
    assert RMSNorm(config, 64).weight.sequence_parallel is True


def test_context_slices_are_the_zig_zag_chunks_and_cover_everything():
    row = torch.arange(16)[None]
    parts = [context_slice(row, 2, rank)[0].tolist() for rank in range(2)]
    assert parts == [[0, 1, 2, 3, 12, 13, 14, 15], [4, 5, 6, 7, 8, 9, 10, 11]]
    assert sorted(sum((context_slice(row, 4, rank)[0].tolist() for rank in range(4)), [])) == list(range(16))
    with pytest.raises(ValueError, match="2 x 3 chunks"):
        context_slice(row, 3, 0)


def test_context_slices_equal_upstreams(monkeypatch):
    import inspect

    from megatron.core.utils import get_batch_on_this_cp_rank

    later = {"is_hybrid_cp": False} if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters else {}
    # 0.16 asks the group itself for size and rank, 0.19 asks torch.distributed.
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group.rank())
    row = torch.arange(24).repeat(2, 1)
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        theirs = get_batch_on_this_cp_rank({"tokens": row.clone()}, cp_group=group, **later)["tokens"]
        assert torch.equal(context_slice(row, 3, rank), theirs)
