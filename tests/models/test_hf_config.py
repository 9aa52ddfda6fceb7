"""config.json: refused when it is not what this project extends, and exported so that transformers builds our table."""

from __future__ import annotations

import json

import pytest
import torch

from endprompt.errors import UserError
from endprompt.models.hf_config import RECORD, extended_config, load_hf_config, oldest_transformers, rope_of_config
from endprompt.rope import RopeScaling, attention_factor, effective_theta, inverse_frequencies

ORIGINAL, TARGET = 512, 4096
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": ORIGINAL,
    "rope_theta": 50000.0,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def scaling(kind: str, **fields) -> RopeScaling:
    return RopeScaling(kind, **{"theta": 50000.0, "head_dim": 16, "factor": 8.0, "original_length": ORIGINAL, **fields})


SCALINGS = {
    "none": scaling("none"),
    "linear": scaling("linear"),
    "ntk": scaling("ntk"),
    "yarn": scaling("yarn"),
    "yarn, factor beyond the ratio, own attention factor": scaling("yarn", factor=12.0, attention_factor=1.05),
    "llama3": scaling("llama3"),
    "llama3 interpolated": scaling("llama3", factor=4.0, interpolation=2.0),
}


def written(tmp_path, config: dict):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("config", [LLAMA, MISTRAL], ids=["llama", "mistral"])
@pytest.mark.parametrize("rope", SCALINGS.values(), ids=SCALINGS)
def test_transformers_builds_our_table(rope, config, tmp_path):
    """From the file, and whatever positions a forward pass brings: longrope must not switch tables."""
    from transformers import AutoConfig, AutoModelForCausalLM

    read = AutoConfig.from_pretrained(written(tmp_path, extended_config(config, rope, TARGET)))
    assert read.max_position_embeddings == TARGET
    rotary = AutoModelForCausalLM.from_config(read).model.rotary_emb
    for last in (TARGET - 1, 3, ORIGINAL, 10 * TARGET, 3):
        positions = torch.tensor([[0, 1, 2, last]])
        cos, sin = rotary(torch.zeros(1, 4, 64), positions)
        torch.testing.assert_close(rotary.inv_freq, inverse_frequencies(rope), rtol=1e-6, atol=0)
        angles = positions[0, :3, None] * torch.cat([inverse_frequencies(rope)] * 2)
        torch.testing.assert_close(cos[0, :3], angles.cos() * attention_factor(rope), rtol=0, atol=1e-5)
        torch.testing.assert_close(sin[0, :3], angles.sin() * attention_factor(rope), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rope", SCALINGS.values(), ids=SCALINGS)
def test_old_and_new_keys_say_the_same(rope):
    """4.x reads rope_theta and rope_scaling, 5.x rope_parameters; `type` beside `rope_type` is for readers before 4.43."""
    config = extended_config(LLAMA, rope, TARGET)
    new, old = dict(config["rope_parameters"]), config["rope_scaling"]
    assert new.pop("rope_theta") == config["rope_theta"] == effective_theta(rope)
    if old is None:
        assert new == {"rope_type": "default"} and rope.type in ("none", "ntk")
    else:
        assert old == {"type": new["rope_type"], **new}
    assert config["head_dim"] == 16  # its absence breaks yarn and longrope for Mistral in 4.52 to 4.57


@pytest.mark.parametrize("rope", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("keep", ["both", "rope_scaling", "rope_parameters"])
def test_exports_come_back(rope, keep):
    config = json.loads(json.dumps(extended_config(LLAMA, rope, TARGET)))
    if keep == "rope_scaling":
        del config["rope_parameters"]
    if keep == "rope_parameters":  # what transformers 5 writes when it saves the model again
        del config["rope_scaling"], config["rope_theta"]
    expected = RopeScaling("none", effective_theta(rope), 16) if rope.type == "ntk" else rope
    assert rope_of_config(config) == expected


def test_readers_that_ignore_attention_factor_derive_1():
    """vLLM scales longrope by the ratio of the two windows, others by `factor`."""
    written = extended_config(LLAMA, SCALINGS["llama3 interpolated"], TARGET)
    table = written["rope_scaling"]
    assert table["original_max_position_embeddings"] == written["max_position_embeddings"] == TARGET
    assert table["factor"] == table["attention_factor"] == 1.0


def test_an_export_survives_being_saved_by_transformers(tmp_path):
    from transformers import AutoConfig

    for rope in SCALINGS.values():
        AutoConfig.from_pretrained(written(tmp_path, extended_config(LLAMA, rope, TARGET))).save_pretrained(tmp_path)
        read = rope_of_config(load_hf_config(tmp_path))
        torch.testing.assert_close(inverse_frequencies(read), inverse_frequencies(rope))


def test_extending_leaves_the_input_and_all_else_alone():
    before = {**LLAMA, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 77, "rope_scaling": {"type": "linear", "factor": 2.0}}
    copy = json.loads(json.dumps(before))
    after = extended_config(before, SCALINGS["yarn"], TARGET)
    assert before == copy
    # At top level it would win over the one beside the scaling in transformers 5.
    assert "original_max_position_embeddings" not in after
    untouched = before.keys() - {"max_position_embeddings", "original_max_position_embeddings", "rope_scaling"}
    assert {key: after[key] for key in untouched} == {key: before[key] for key in untouched}


def test_extending_twice_leaves_nothing_of_the_first():
    first = extended_config(LLAMA, SCALINGS["llama3 interpolated"], TARGET)
    second = extended_config(first, SCALINGS["linear"], TARGET)
    assert RECORD in first and RECORD not in second
    assert rope_of_config(second) == SCALINGS["linear"]


def test_a_record_that_contradicts_its_table_is_refused():
    config = extended_config(LLAMA, SCALINGS["llama3 interpolated"], TARGET)
    config[RECORD] = {**config[RECORD], "factor": 8.0}
    with pytest.raises(UserError, match="does not describe the longrope table"):
        rope_of_config(config)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, RopeScaling("none", 50000.0, 16)),
        ({"rope_theta": None}, RopeScaling("none", 10000.0, 16)),
        ({"rope_scaling": None, "rope_parameters": None}, RopeScaling("none", 50000.0, 16)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling("linear", 50000.0, 16, factor=2.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}, "rope_theta": None}, RopeScaling("none", 7e5, 16)),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": True}},
            RopeScaling("yarn", 50000.0, 16, factor=4.0, original_length=512),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeScaling("llama3", 50000.0, 16, factor=8.0, original_length=8192),
        ),
    ],
)
def test_checkpoints_of_others_are_read(keys, expected):
    assert rope_of_config({key: value for key, value in {**LLAMA, **keys}.items() if value is not None}) == expected


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "'longrope' is not supported"),
        ({"rope_scaling": "linear"}, "is not an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "must be a number above 0, found 'two'"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor must be at least 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings: is missing"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale_all_dim": 1.0}},
            "mscale_all_dim: 1.0 changes yarn",
        ),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 changes default"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "disagrees with rope_scaling",
        ),
        ({"rope_theta": -1.0}, "rope_theta: must be a number above 0"),
    ],
)
def test_other_ropes_are_refused(keys, words, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        load_hf_config(written(tmp_path, {**LLAMA, **keys}))
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "qwen2"}, "model_type: 'qwen2' is not supported"),
        ({"model_type": None}, "model_type: None is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"hidden_act": "gelu"}, 'use a checkpoint with hidden_act "silu"'),
        ({"vocab_size": "many"}, "vocab_size: must be a whole number above 0, found 'many'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be a whole number"),
        ({"num_key_value_heads": 3}, "3 does not divide 4 attention heads"),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, "6 does not divide hidden_size 64"),
        ({"head_dim": 15}, "head_dim: must be even"),
    ],
)
def test_unsupported_checkpoints_are_refused(changes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        load_hf_config(written(tmp_path, {**LLAMA, **changes}))


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
)
def test_missing_fields_are_named(key, tmp_path):
    with pytest.raises(UserError, match=f"{key}: is missing"):
        load_hf_config(written(tmp_path, {k: v for k, v in LLAMA.items() if k != key}))


def test_mistral_with_a_sliding_window_is_refused(tmp_path):
    """v0.1 has 4096; v0.3 has null."""
    assert load_hf_config(written(tmp_path, MISTRAL)) == MISTRAL
    with pytest.raises(UserError, match="sliding_window: attention is limited to 4096 tokens.*full-attention checkpoint"):
        load_hf_config(written(tmp_path, {**MISTRAL, "sliding_window": 4096}))


@pytest.mark.parametrize(
    "content, words", [(b'{"model_type": "lla', "not valid JSON"), (b"[1, 2]", "holds a list"), (b"\xff\xfe{", "not valid JSON")]
)
def test_broken_files_are_bad_input(content, words, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_hf_config(tmp_path)


def test_a_missing_file_is_bad_input(tmp_path):
    with pytest.raises(UserError, match="config.json: not found; set model.path"):
        load_hf_config(tmp_path / "nowhere")


def test_oldest_transformers():
    """Measured; see the module's text."""
    oldest = {name: oldest_transformers(LLAMA, rope, TARGET) for name, rope in SCALINGS.items()}
    assert list(oldest.values()) == ["4.40", "4.43", "4.40", "4.51", "4.56", "4.43", "4.43"]
    assert oldest_transformers(MISTRAL, SCALINGS["linear"], TARGET) == "4.48"
