"""Rotary tables against the reference values of the papers, against transformers and against Megatron-Core."""

from __future__ import annotations

import math

import pytest
import torch

from endprompt.errors import UserError
from endprompt.rope import RopeScaling, attention_factor, describe, effective_theta, inverse_frequencies, scaling_for, yarn_ramp
from tests.support.recipes import make_recipe

REFERENCE = {  # theta 5e5, D 128, s 8, O 8192: pairs 0, 16, 32, 48, 63
    "none": (1, 3.760603e-2, 1.414214e-3, 5.318296e-5, 2.455141e-6),
    "linear": (1 / 8, 3.760603e-2 / 8, 1.414214e-3 / 8, 5.318296e-5 / 8, 2.455141e-6 / 8),
    "ntk": (1, 2.217692e-2, 4.918160e-4, 1.090697e-5, 3.068926e-7),
    "yarn": (1, 3.760603e-2, 3.951479e-4, 6.647870e-6, 3.068926e-7),
    "llama3": (1, 3.760603e-2, 5.248462e-4, 6.647870e-6, 3.068926e-7),
}


def scaling(kind: str, **fields) -> RopeScaling:
    return RopeScaling(kind, **{"theta": 5e5, "head_dim": 128, "factor": 8.0, "original_length": 8192, **fields})


@pytest.mark.parametrize("kind", REFERENCE)
def test_reference_values(kind):
    table = inverse_frequencies(scaling(kind))
    assert table.dtype == torch.float32 and table.shape == (64,)
    assert table[[0, 16, 32, 48, 63]].tolist() == pytest.approx(REFERENCE[kind], rel=1e-6)


def test_reference_ranges():
    assert yarn_ramp(scaling("yarn")) == (18, 35)
    assert attention_factor(scaling("yarn")) == pytest.approx(1.207944, abs=1e-6)
    assert effective_theta(scaling("ntk")) == pytest.approx(4.13423e6, rel=1e-6)
    plain, llama3 = inverse_frequencies(scaling("none")), inverse_frequencies(scaling("llama3"))
    between = [j for j in range(64) if plain[j] / 8 * 1.000001 < llama3[j] < plain[j] * 0.999999]
    assert between == list(range(29, 35))


@pytest.mark.parametrize("kind", REFERENCE)
def test_a_table_is_rounded_once(kind):
    """fp32 entries lie within half a unit in the last place of the formula evaluated with Python floats."""

    def formula(j: int) -> float:
        theta = 5e5 * 8 ** (128 / 126) if kind == "ntk" else 5e5
        f = theta ** (-2 * j / 128)
        keep = {
            "linear": 0.0,
            "yarn": 1 - min(max((j - 18) / (35 - 18), 0), 1),
            "llama3": min(max((8192 * f / (2 * math.pi) - 1) / 3, 0), 1),
        }.get(kind, 1.0)
        return keep * f + (1 - keep) * f / 8

    expected = torch.tensor([formula(j) for j in range(64)], dtype=torch.float64)
    torch.testing.assert_close(inverse_frequencies(scaling(kind)).double(), expected, rtol=2**-24 * 1.01, atol=0)


@pytest.mark.parametrize("head_dim, theta, original", [(128, 5e5, 8192), (64, 1e5, 2048), (128, 1e4, 4096)])
@pytest.mark.parametrize(
    "kind, fields",
    [
        ("linear", {}),
        ("linear", {"factor": 2.5}),
        ("yarn", {}),
        ("yarn", {"factor": 4.0, "beta_fast": 24.0, "beta_slow": 2.0}),
        ("yarn", {"factor": 32.0, "attention_factor": 1.1}),
        ("llama3", {"factor": 32.0}),
        ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 8.0}),
    ],
)
def test_equals_transformers(kind, fields, head_dim, theta, original):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours = scaling(kind, theta=theta, head_dim=head_dim, original_length=original, **fields)
    parameters = {"rope_type": kind, "rope_theta": theta, "factor": ours.factor}
    if kind != "linear":
        parameters["original_max_position_embeddings"] = original
    if kind == "llama3":
        parameters |= {"low_freq_factor": ours.low_freq_factor, "high_freq_factor": ours.high_freq_factor}
    if kind == "yarn":
        parameters |= {"beta_fast": ours.beta_fast, "beta_slow": ours.beta_slow}
        parameters |= {"attention_factor": fields["attention_factor"]} if "attention_factor" in fields else {}
    config = LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_parameters=parameters,
        max_position_embeddings=int(original * ours.factor),
    )  # fmt: skip
    table, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    torch.testing.assert_close(inverse_frequencies(ours), table, rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn", "llama3"])
def test_equals_megatron(kind, monkeypatch):
    """With the arguments that spec section 7 names; Megatron's frequencies are its angles at position 1."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding

    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    ours, concentration = scaling(kind), 1.0
    common = {"kv_channels": 128, "rotary_percent": 1.0, "use_cpu_initialization": True}
    if kind == "yarn":
        rotary = YarnRotaryEmbedding(
            **common, rotary_base=5e5, scaling_factor=8.0, original_max_position_embeddings=8192, mscale=1.0, mscale_all_dim=0.0
        )
        angles, concentration = rotary.get_emb(2)
    else:
        rotary = RotaryEmbedding(
            **common,
            rotary_base=effective_theta(ours),
            seq_len_interpolation_factor=8 if kind == "linear" else None,
            rope_scaling=kind == "llama3",
            rope_scaling_factor=8.0,
        )
        angles = rotary.get_emb(2)
    torch.testing.assert_close(inverse_frequencies(ours), angles[1, 0, 0, :64], rtol=1e-6, atol=0)
    assert attention_factor(ours) == pytest.approx(concentration)


def test_interpolation_divides_the_whole_llama3_table():
    doubled = inverse_frequencies(scaling("llama3", interpolation=2.0))
    assert torch.equal(doubled, inverse_frequencies(scaling("llama3")) / 2)


def test_equal_tables_compare_equal():
    assert scaling("linear") == scaling("linear", original_length=None, beta_fast=9.0, interpolation=3.0)
    assert scaling("yarn") == scaling("yarn", attention_factor=0.1 * math.log(8) + 1)
    assert describe(scaling("linear")) == "linear rope (theta 500000, factor 8)"


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"head_dim": 7}, "head_dim"),
        ({"factor": 0.5}, "factor must be at least 1"),
        ({"original_length": None}, "needs original_length"),
        ({"beta_fast": 1.0}, "beta_fast"),
    ],
)
def test_impossible_scalings_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        scaling("yarn", **fields)


# What a recipe makes of a checkpoint's own rotary embedding.

PLAIN = RopeScaling("none", 5e5, 128)
LLAMA31 = RopeScaling("llama3", 5e5, 128, factor=8.0, original_length=8192)
LONGER_LLAMA31 = {
    "model.original_length": 131072,
    "target_length": 262144,
    "rope.type": "llama3",
    "rope.factor": 8,
    "rope.original_length": 8192,
    "rope.interpolation": 2,
}


def test_theta_is_the_checkpoints_unless_the_recipe_sets_it():
    assert scaling_for(make_recipe(), PLAIN) == RopeScaling("linear", 5e5, 128, factor=8.0)
    assert scaling_for(make_recipe(**{"rope.theta": 1e6}), PLAIN).theta == 1e6


def test_yarn_counts_from_the_pretrained_window():
    assert scaling_for(make_recipe(**{"rope.type": "yarn"}), PLAIN) == RopeScaling("yarn", 5e5, 128, factor=8.0, original_length=128)


@pytest.mark.parametrize("kind", ["none", "linear", "ntk", "yarn"])
def test_llama31_scaling_is_never_dropped(kind):
    recipe = make_recipe(**{"model.original_length": 131072, "target_length": 262144, "rope.type": kind})
    with pytest.raises(UserError, match=r"rope.type: llama3 with factor: 8, original_length: 8192 and rope.interpolation: 2 "):
        scaling_for(recipe, LLAMA31)


def test_llama31_goes_on_by_interpolation():
    extended = scaling_for(make_recipe(**LONGER_LLAMA31), LLAMA31)
    assert torch.equal(inverse_frequencies(extended), inverse_frequencies(LLAMA31) / 2)


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("rope.factor", 4, "rope.factor: 8"),
        ("rope.factor", "null", "rope.factor: 8"),
        ("rope.original_length", 131072, "rope.original_length: 8192"),
        ("rope.high_freq_factor", 5, "rope.high_freq_factor: 4"),
    ],
)
def test_llama31_parameters_must_agree(field, value, shown):
    recipe = make_recipe(**{**LONGER_LLAMA31, "rope.interpolation": 4, field: value})
    with pytest.raises(UserError, match=f"disagrees.*set {shown}"):
        scaling_for(recipe, LLAMA31)


def test_an_extended_checkpoint_can_be_extended_further_but_not_back():
    once = RopeScaling("linear", 5e5, 128, factor=4.0)
    assert scaling_for(make_recipe(), once).factor == 8
    with pytest.raises(UserError, match="8 is smaller than before.*set at least 16"):
        scaling_for(make_recipe(), RopeScaling("linear", 5e5, 128, factor=16.0))
    with pytest.raises(UserError, match="use rope.type: linear"):
        scaling_for(make_recipe(**{"rope.type": "ntk"}), once)


def test_a_factor_below_one_is_bad_input():
    with pytest.raises(UserError, match="rope: factor must be at least 1, found 0.5"):
        scaling_for(make_recipe(**{"rope.type": "yarn", "rope.factor": 0.5}), PLAIN)
