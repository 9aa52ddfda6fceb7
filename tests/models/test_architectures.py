"""Facts of checkpoints: parameter counts against transformers, FLOPs against torch's counter, and mismatches noticed."""

from __future__ import annotations

import pytest
import torch

from endprompt.errors import UserError
from endprompt.models.architectures import (
    ARCHITECTURES,
    Architecture,
    architecture_of_config,
    forward_flops_per_token,
    get_architecture,
    resolve_architecture,
    training_flops_per_token,
)
from endprompt.models.hf_config import extended_config
from endprompt.rope import RopeScaling
from tests.support.recipes import make_recipe

PUBLISHED = {  # as on the model cards and in the safetensors headers of the checkpoints
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3.1_8b": 8_030_261_248,
    "llama3.1_70b": 70_553_706_496,
    "llama3.2_1b": 1_235_814_400,
    "llama3.2_3b": 3_212_749_824,
    "mistral_7b": 7_248_023_552,
    "smollm2_135m": 134_515_008,
}


def config_of(architecture: Architecture) -> dict:
    """The config.json that such a checkpoint has."""
    kind, name = ("mistral", "MistralForCausalLM") if architecture.name.startswith("mistral") else ("llama", "LlamaForCausalLM")
    config = {
        "model_type": kind,
        "architectures": [name],
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_size,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "tie_word_embeddings": architecture.tied,
    }
    return extended_config(config, architecture.rope, architecture.original_length)


def recipe_for(name: str, **overrides):
    length = get_architecture(name).original_length if name in ARCHITECTURES else 128
    fields = {"model.architecture": name, "model.original_length": length, "target_length": 8 * length, "rope.type": "linear"}
    return make_recipe(**{**fields, **overrides})


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_parameters_equal_those_of_transformers(architecture, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config = config_of(architecture)
    of, model = (MistralConfig, MistralForCausalLM) if config["model_type"] == "mistral" else (LlamaConfig, LlamaForCausalLM)
    with torch.device("meta"):
        built = model(of(**config))
    assert architecture.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert architecture.parameters == PUBLISHED.get(architecture.name, architecture.parameters)
    matrices = sum(module.weight.numel() for module in built.modules() if isinstance(module, torch.nn.Linear))
    assert architecture.matmul_parameters == matrices


@pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_facts_and_config_agree(architecture):
    assert resolve_architecture(recipe_for(architecture.name), config_of(architecture)) == architecture


def test_flops_equal_the_counter_of_torch():
    """The counter sees eager attention, which computes the whole square: twice our causal term, less the diagonal."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny, length = get_architecture("tiny"), 128
    model = LlamaForCausalLM(LlamaConfig(**config_of(tiny), attn_implementation="eager"))
    tokens = torch.arange(length).unsqueeze(0)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    causal_attention = training_flops_per_token(tiny, length) - 6 * tiny.matmul_parameters
    square_attention = causal_attention * 2 * length / (length + 1)
    expected = length * (6 * tiny.matmul_parameters + square_attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert causal_attention > 0.1 * expected / length  # so that the attention term is really tested


def test_flops_of_llama3_8b():
    """Spec section 12d: 7.505e9 matmul parameters; 64K costs 1.88 times 8K per token, and recomputation is not in it."""
    llama = get_architecture("llama3_8b")
    assert llama.matmul_parameters == pytest.approx(7.505e9, rel=1e-3)
    assert training_flops_per_token(llama, 8192) == pytest.approx(51.5e9, rel=1e-3)
    assert training_flops_per_token(llama, 65536) / training_flops_per_token(llama, 8192) == pytest.approx(1.88, abs=0.005)
    assert training_flops_per_token(llama, 8192) == 3 * forward_flops_per_token(llama, 8192)
    big = get_architecture("llama3_70b")
    assert training_flops_per_token(big, 262144) / training_flops_per_token(big, 8192) == pytest.approx(3.22, abs=0.01)


@pytest.mark.parametrize(
    "name, words",
    [
        ("llama3_8B", "did you mean llama3_8b"),
        ("llama31_8b", "did you mean llama3.1_8b"),
        ("gpt2", "use one of llama2_7b"),
        ("custom", "give model.path"),
    ],
)
def test_unknown_names_are_bad_input(name, words):
    with pytest.raises(UserError, match=words):
        get_architecture(name)


@pytest.mark.parametrize(
    "key, value, field",
    [
        ("num_hidden_layers", 16, "layers is 16, but llama3_8b has 32"),
        ("hidden_size", 2048, "hidden_size is 2048"),
        ("intermediate_size", 8192, "ffn_size is 8192"),
        ("num_attention_heads", 16, "heads is 16"),
        ("num_key_value_heads", 32, "kv_heads is 32"),
        ("head_dim", 64, "head_dim is 64"),
        ("vocab_size", 128258, "vocab_size is 128258, but llama3_8b has 128256"),
        ("tie_word_embeddings", True, "tied is True"),
    ],
)
def test_the_differing_fact_is_named(key, value, field):
    with pytest.raises(UserError, match=field):
        resolve_architecture(recipe_for("llama3_8b"), {**config_of(get_architecture("llama3_8b")), key: value})


def test_another_rope_is_noticed():
    llama31, llama3 = (config_of(get_architecture(name)) for name in ("llama3.1_8b", "llama3_8b"))
    with pytest.raises(UserError, match=r"has llama3 rope \(theta 500000, factor 8, .* but llama3_8b has plain rope"):
        resolve_architecture(recipe_for("llama3_8b"), llama31)
    with pytest.raises(UserError, match="has plain rope .* but llama3.1_8b has llama3 rope"):
        resolve_architecture(recipe_for("llama3.1_8b"), llama3)
    ntk = extended_config(llama3, RopeScaling("ntk", 5e5, 128, factor=8.0), 65536)
    with pytest.raises(UserError, match="theta 4.13423e.06"):
        resolve_architecture(recipe_for("llama3_8b"), ntk)


def test_another_window_is_noticed():
    config = config_of(get_architecture("llama3_8b"))
    with pytest.raises(UserError, match="model.original_length: is 4096, but .* is 8192; set it to 8192"):
        resolve_architecture(recipe_for("llama3_8b", **{"model.original_length": 4096}), config)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_an_extended_checkpoint_is_still_that_architecture(kind):
    llama3 = get_architecture("llama3_8b")
    rope = RopeScaling(kind, 5e5, 128, factor=8.0, original_length=8192)
    found = resolve_architecture(recipe_for("llama3_8b"), extended_config(config_of(llama3), rope, 65536))
    assert (found.rope, found.original_length, found.tokenizer) == (rope, 8192, "llama3")


def test_custom_takes_the_facts_of_the_config():
    config = config_of(get_architecture("tiny"))
    found = resolve_architecture(recipe_for("custom"), {**config, "num_hidden_layers": 7})
    assert (found.name, found.layers, found.vocab_size) == ("custom", 7, 512)


def test_keys_that_old_checkpoints_leave_out():
    """Llama-2-7b-hf has neither rope_theta nor head_dim; single-group checkpoints have no num_key_value_heads."""
    config = config_of(get_architecture("llama2_7b"))
    for key in ("rope_theta", "rope_parameters", "rope_scaling", "head_dim", "num_key_value_heads", "tie_word_embeddings"):
        del config[key]
    assert resolve_architecture(recipe_for("llama2_7b"), config) == get_architecture("llama2_7b")
    assert architecture_of_config(config).rope.theta == 10000.0
