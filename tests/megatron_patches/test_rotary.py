"""RoPE from given positions: bit-equal to upstream for ordinary ones, equal to transformers and to plain formulae for any."""

import math

import pytest
import torch
import torch.nn.functional as F

import megatron_patches
from endprompt.errors import UserError
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies
from megatron_patches import rotary
from megatron_patches.modules import CausalAttention
from tests.support.one_rank import huggingface_twin, one_rank_world, stock_model

N, B = 24, 3
TOKENS = torch.randint(0, 128, (B, N), generator=torch.Generator().manual_seed(3))
ARANGE = torch.arange(N).repeat(B, 1)
HIDDEN = torch.ones(N, N, dtype=torch.bool).triu(1)[None, None]  # Megatron's masks are True where nothing is seen
YARN = {
    "yarn_rotary_scaling_factor": 8.0, "yarn_original_max_position_embeddings": 128, "yarn_beta_fast": 32.0, "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0, "yarn_correction_range_round_to_int": True,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def world():
    with one_rank_world():
        yield


def jumping(scheme: str) -> torch.Tensor:
    """Positions of three samples that all differ: a terminal segment, two chunks, or random."""
    rows = []
    for sample in range(B):
        draw = torch.Generator().manual_seed(sample)
        if scheme == "endprompt":
            end = 1024 - 100 * sample
            rows.append(torch.cat([torch.arange(N - 6), torch.arange(end - 6, end)]))
        elif scheme == "pose":
            start = 50 + int(torch.randint(0, 900, (), generator=draw))
            rows.append(torch.cat([torch.arange(N // 2), torch.arange(start, start + N // 2)]))
        else:
            rows.append(torch.randperm(1024, generator=draw)[:N].sort().values)
    return torch.stack(rows)


def logits_and_gradients(model, positions, tokens=TOKENS):
    model.zero_grad()
    logits = model(tokens, positions, HIDDEN)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_identical(first, second):
    assert torch.equal(first[0], second[0])
    for name, gradient in first[1].items():
        assert torch.equal(gradient, second[1][name]), name


@pytest.mark.parametrize(
    "model_options, config_options",
    [
        ({}, {}),
        ({"seq_len_interpolation_factor": 8}, {}),
        ({"rope_scaling": True, "rope_scaling_factor": 8.0}, {}),
        ({"rotary_percent": 0.5}, {}),
        ({}, {"rotary_interleaved": True}),
        ({}, {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}),
        ({}, {"recompute_granularity": "selective"}),
        ({"position_embedding_type": "yarn"}, {}),
    ],
    ids=["rope", "interpolated", "llama3", "half", "interleaved", "full recompute", "selective recompute", "yarn"],
)
@pytest.mark.parametrize("one_layout", [False, True], ids=["table per sample", "one table"])
def test_ordinary_positions_change_no_bit(model_options, config_options, one_layout):
    attributes = YARN if model_options.get("position_embedding_type") == "yarn" else None
    model = stock_model(model_options=model_options, attributes=attributes, **config_options)
    upstream = logits_and_gradients(model, ARANGE)
    megatron_patches.apply()
    rotary.state.one_layout = one_layout
    assert_identical(logits_and_gradients(model, ARANGE), upstream)
    if not one_layout:
        moved, _ = logits_and_gradients(model, jumping("pose"))
        assert not torch.allclose(moved, upstream[0], atol=1e-2), "the patch is at work"


def test_upstream_still_ignores_positions():
    """The reason for the patch; once this fails, upstream has changed."""
    model = stock_model()
    assert torch.equal(model(TOKENS, ARANGE, HIDDEN), model(TOKENS, jumping("random"), HIDDEN))


@pytest.mark.parametrize("scheme", ["endprompt", "pose", "random"])
@pytest.mark.parametrize("attention", [None, CausalAttention], ids=["upstream attention", "ours"])
def test_equals_transformers(scheme, attention):
    positions = jumping(scheme)
    megatron_patches.apply()
    model = stock_model(attention=attention)
    twin = huggingface_twin(model)
    logits, gradients = logits_and_gradients(model, positions)
    mask = torch.full((N, N), float("-inf")).triu(1)[None, None].expand(B, 1, N, N)
    expected = twin(input_ids=TOKENS, position_ids=positions, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    assert (logits - expected).abs().max() < 1e-4
    other = huggingface_twin_gradients(twin, model)
    for name, gradient in gradients.items():
        assert (gradient - other[name]).norm() < 1e-4 * other[name].norm(), name


def huggingface_twin_gradients(twin, model) -> dict[str, torch.Tensor]:
    """The twin's gradients in Megatron's packing."""
    from endprompt.checkpoint.mapping import huggingface_names, join, row_of
    from endprompt.models.architectures import Architecture

    shape = Architecture("t", 2, 64, 128, 4, 2, 16, 128, 4096, RopeScaling("none", 1e4, 16))
    named = dict(twin.named_parameters())
    packed = {}
    for name, _ in model.named_parameters():
        row, layer = row_of(name)
        packed[name] = join([named[source].grad for source in huggingface_names(row, layer)], row.layout, shape)
    return packed


@pytest.mark.parametrize(
    "scaling",
    [
        RopeScaling("linear", 1e4, 16, factor=8.0),
        RopeScaling("ntk", 1e4, 16, factor=8.0),
        RopeScaling("yarn", 1e4, 16, factor=8.0, original_length=128),
        RopeScaling("llama3", 5e5, 16, factor=8.0, original_length=8192),
        RopeScaling("llama3", 5e5, 16, factor=8.0, original_length=8192, interpolation=2.0),
    ],
    ids=lambda scaling: f"{scaling.type}{' + PI' if scaling.interpolation > 1 else ''}",
)
def test_every_scaling_equals_a_hand_written_layer(scaling):
    """q.k of the first layer's attention, by the plain formula: rotate pairs (i, i + d/2) by position times frequency."""
    positions = jumping("endprompt")
    megatron_patches.apply()
    rotary.state.set(one_layout=False, scaling=scaling)
    model = stock_model(attention=CausalAttention)
    seen = {}
    core = model.decoder.layers[0].self_attention.core_attention
    core.register_forward_pre_hook(lambda module, arguments: seen.update(query=arguments[0].detach(), key=arguments[1].detach()))
    plain = {}
    layer = model.decoder.layers[0].self_attention
    layer.linear_qkv.register_forward_hook(lambda module, arguments, output: plain.update(mixed=output[0].detach()))
    model(TOKENS, positions, None)
    mixed = plain["mixed"].view(N, B, 2, 4, 16)  # groups x (2 queries, key, value) x head_dim
    query, key = mixed[..., :2, :].reshape(N, B, 4, 16), mixed[..., 2, :]

    def turned(vectors: torch.Tensor) -> torch.Tensor:
        angle = positions.t().double()[:, :, None, None] * inverse_frequencies(scaling).double()
        cos, sin = angle.cos() * attention_factor(scaling), angle.sin() * attention_factor(scaling)
        first, second = vectors.double().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    assert (seen["query"] - turned(query)).abs().max() < 1e-3
    assert (seen["key"] - turned(key)).abs().max() < 1e-3
    assert attention_factor(scaling) == pytest.approx(0.1 * math.log(8) + 1 if scaling.type == "yarn" else 1)


def packed_parameters(lengths: list[int]):
    from megatron.core.packed_seq_params import PackedSeqParams

    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    longest = max(lengths)
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest)


@pytest.mark.parametrize("lengths", [[10, 14], [5, 12, 7], [24]], ids=str)
def test_packed_sequences_follow_their_own_positions(lengths):
    positions = jumping("random")[0]
    megatron_patches.apply()
    model = stock_model(attention=CausalAttention)
    packed = model(TOKENS[:1], positions[None], None, packed_seq_params=packed_parameters(lengths))
    start = 0
    for length in lengths:
        alone = model(TOKENS[:1, start : start + length], positions[None, start : start + length], None)
        assert (packed[:, start : start + length] - alone).abs().max() < 1e-5
        start += length


def test_missing_or_unsliced_positions_are_refused():
    megatron_patches.apply()
    model = stock_model()
    with pytest.raises(ValueError, match="every pipeline stage must pass them"):
        model(TOKENS, None, HIDDEN)
    with pytest.raises(ValueError, match="slice them for context parallelism"):
        model(TOKENS, torch.arange(2 * N).repeat(B, 1), HIDDEN)


def test_fused_rope_is_refused_where_it_would_take_the_first_row_for_all():
    megatron_patches.apply()
    model = stock_model()
    model.config.apply_rope_fusion = True  # the configuration itself refuses it without Transformer Engine
    with pytest.raises(UserError, match="rope_fusion: false"):
        model(TOKENS, jumping("pose"), HIDDEN)


@pytest.mark.parametrize("field", ["fused_single_qkv_rope", "multi_latent_attention", "enable_cuda_graph", "mtp_num_layers"])
def test_models_whose_rope_lies_elsewhere_are_refused(field):
    model = stock_model()
    setattr(model.config, field, 1)
    with pytest.raises(UserError, match=field):
        rotary.check_model(model)


def test_other_position_embeddings_are_refused():
    model = stock_model(model_options={"position_embedding_type": "learned_absolute"})
    with pytest.raises(UserError, match="use rope or yarn"):
        rotary.check_model(model)


def test_remove_puts_upstream_back():
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import attention

    before = GPTModel._preprocess, attention.apply_rotary_pos_emb
    megatron_patches.apply()
    assert GPTModel._preprocess is not before[0] and attention.apply_rotary_pos_emb is not before[1]
    megatron_patches.apply()  # twice changes nothing
    megatron_patches.remove()
    assert (GPTModel._preprocess, attention.apply_rotary_pos_emb) == before
