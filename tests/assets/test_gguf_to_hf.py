"""Conversion of a tiny GGUF written here as llama.cpp writes one, against transformers' own GGUF loader and a formula."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, LlamaForCausalLM

from endprompt.assets.gguf_to_hf import convert, hf_name, undo_rope_permutation
from endprompt.errors import UserError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
MERGES = ["t h", "th e", "Ġ the", "Ġ 1"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


def llama_cpp_permutation(weight: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def hf_weights(tied: bool = True) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": (len(TOKENS), HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        shapes |= {
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{start}self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{start}self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{start}self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{start}post_attention_layernorm.weight": (HIDDEN,),
            f"{start}mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{start}mlp.up_proj.weight": (FFN, HIDDEN),
            f"{start}mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {name: random.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in whole:
        return whole[name]
    _, _, layer, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{GGUF_PARTS[part]}.weight"


def write_gguf(path: Path, *, tied: bool = True, quantised: bool = False, change=lambda fields, tensors: None) -> Path:
    fields = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 50000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}",
    }
    heads = {"q_proj": HEADS, "k_proj": KV_HEADS}
    tensors = {}
    for name, weight in hf_weights(tied).items():
        count = heads.get(name.split(".")[-2])
        tensors[gguf_name(name)] = llama_cpp_permutation(weight, count) if count else weight
    change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture"))
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        else:
            writer.add_uint32(name, value)
    for name, weight in tensors.items():
        if quantised and weight.ndim == 2:
            writer.add_tensor(name, gguf.quantize(weight, Q4_1), raw_dtype=Q4_1)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_unquantised_weights_come_back_exactly(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "hf", dtype="float32")
    written, expected = load_file(tmp_path / "hf" / "model.safetensors"), hf_weights()
    assert set(written) == set(expected)
    for name, weight in expected.items():
        assert written[name].dtype == torch.float32 and torch.equal(written[name], torch.from_numpy(weight)), name


def test_bfloat16_is_the_default_and_only_rounds(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "hf")
    for name, weight in load_file(tmp_path / "hf" / "model.safetensors").items():
        assert torch.equal(weight, torch.from_numpy(hf_weights()[name]).bfloat16()), name
    assert LlamaForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_quantised_file_equals_transformers_own_loader(tmp_path, tied):
    write_gguf(tmp_path / "m.gguf", tied=tied, quantised=True)
    convert(tmp_path / "m.gguf", tmp_path / "hf", dtype="float32")
    ours = LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    assert ours.config.tie_word_embeddings is tied and ours.config.rope_parameters["rope_theta"] == 50000.0
    assert ours.config.rms_norm_eps == 1e-5 and ours.config.max_position_embeddings == 128
    tokens = torch.randint(0, len(TOKENS), (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-5, atol=1e-5)


def test_row_order_gives_the_same_rotary_scores():
    """llama.cpp's rows with rotation of adjacent pairs score as the converted rows with Hugging Face's rotate-half."""
    random = np.random.default_rng(1)
    q, k = random.normal(size=(2, HEAD_DIM, HIDDEN))
    x, y = random.normal(size=(2, HIDDEN))
    angle = 3.0 * 50000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))

    def adjacent(v: np.ndarray) -> np.ndarray:
        pairs = (v[0::2] + 1j * v[1::2]) * np.exp(1j * angle)
        return np.stack([pairs.real, pairs.imag], axis=1).ravel()

    def half(v: np.ndarray) -> np.ndarray:
        pairs = (v[: HEAD_DIM // 2] + 1j * v[HEAD_DIM // 2 :]) * np.exp(1j * angle)
        return np.concatenate([pairs.real, pairs.imag])

    expected = adjacent(q @ x) @ (k @ y)
    assert half(undo_rope_permutation(q, 1) @ x) @ (undo_rope_permutation(k, 1) @ y) == pytest.approx(expected, rel=1e-12)
    assert half(q @ x) @ (k @ y) != pytest.approx(expected, rel=1e-2)


def test_tokenizer_is_byte_level_with_single_digits(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = tokenizer("the 12 the").input_ids
    # "Ġ1" is a merge of the vocabulary, yet digits are split off before merging.
    assert tokenizer.convert_ids_to_tokens(ids) == ["the", "Ġ", "1", "2", "Ġthe"]
    text = "  naïve\n\t日本 — 3.14 <|im_end|>the"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_start|>t").input_ids == [1, TOKENS.index("t")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    assert tokenizer.model_max_length == 128
    assert tokenizer.apply_chat_template([{"content": "the"}], tokenize=False) == "<|im_start|>the<|im_end|>"


def test_generation_config_and_extra_files(tmp_path):
    convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "hf", extra_files={"LICENSE": b"text"})
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert (tmp_path / "hf" / "LICENSE").read_bytes() == b"text"


def test_names_without_a_place_are_refused():
    assert hf_name("blk.12.ffn_down.weight") == "model.layers.12.mlp.down_proj.weight"
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.0.ffn_gate_exps.weight", "blk.0.weight"):
        with pytest.raises(KeyError):
            hf_name(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fields, tensors: fields.update({"general.architecture": "mamba"}), "architecture is mamba; only llama"),
        (lambda fields, tensors: fields.pop("llama.context_length"), "has no field llama.context_length"),
        (lambda fields, tensors: fields.update({"llama.rope.scaling.type": "yarn"}), "extended already"),
        (lambda fields, tensors: fields.update({"tokenizer.ggml.pre": "qwen2"}), "splitting rule qwen2"),
        (lambda fields, tensors: fields.update({"tokenizer.ggml.model": "llama"}), "its tokenizer is llama"),
        (lambda fields, tensors: tensors.update({"rope_freqs.weight": np.ones(8, np.float32)}), "holds the tensor rope_freqs.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused_whole(tmp_path, change, words):
    path = write_gguf(tmp_path / "m.gguf", change=change)
    with pytest.raises(UserError, match=words) as refused:
        convert(path, tmp_path / "hf")
    assert str(path) in str(refused.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


def test_damaged_and_missing_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "none.gguf", tmp_path / "hf")
    content = write_gguf(tmp_path / "m.gguf").read_bytes()
    damaged = {
        "text": b"not a model at all, but long enough",
        "cut": content[:-100],
        "half": content[: len(content) // 2],
        "short": content[:40],
    }
    for name, data in damaged.items():
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(UserError, match="is not a whole GGUF file"):
            convert(tmp_path / f"{name}.gguf", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_output_that_exists_is_left_alone(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert(write_gguf(tmp_path / "m.gguf"), tmp_path / "hf")
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["mine.txt"]
