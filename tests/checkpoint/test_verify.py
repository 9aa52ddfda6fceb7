"""verify_checkpoint.py finds nothing in right conversions and names each planted fault; its two forwards agree with transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from endprompt.checkpoint import views
from endprompt.checkpoint.forward import relative_error, sample_positions
from endprompt.checkpoint.megatron_metadata import FACTS
from endprompt.checkpoint.provenance import CONVERSION
from endprompt.checkpoint.verification import compare_logits, logits_of, tolerance, verify
from endprompt.checkpoint.verify import open_side
from tests.support.checkpoints import FAMILIES, make_family
from tests.support.conversions import convert
from tests.support.workspace import ROOT

FAMILY = "llama3.1"  # GQA, llama3 rope, a window of 131072


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    place = tmp_path_factory.mktemp("good")
    source = make_family(FAMILY, place / "hf", dtype=torch.float32)
    convert("to megatron", source, place / "megatron")
    convert("to huggingface", place / "megatron", place / "back")
    return place


def check(a, b, **options) -> dict:
    settings = {"cast": False, "tensors_only": False, "positions": None, **options}
    return verify(open_side(a), open_side(b), quiet=True, **settings)


def edit_shards(folder, change) -> None:
    """Rewrite the tensors of a copy; the record of the conversion goes, so that the comparison has to see it."""
    (folder / CONVERSION).unlink(missing_ok=True)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rearranged(monkeypatch, good, target, change, **options) -> None:
    """A Megatron checkpoint of a converter with a fault: `change` gets each block of a view's rows after it is read."""
    read = views.MegatronView.read

    def faulty(self, name, start, stop, into):
        whole = bytearray(self.tensors[name].bytes)
        read(self, name, 0, self.tensors[name].rows, memoryview(whole))
        rows = torch.frombuffer(whole, dtype=torch.float32).reshape(self.tensors[name].rows, -1)
        into[:] = change(name, rows)[start:stop].contiguous().view(torch.uint8).numpy().tobytes()

    with monkeypatch.context() as patch:
        patch.setattr(views.MegatronView, "read", faulty)
        convert("to megatron", good / "hf", target, **options)
    (target / CONVERSION).unlink()


def test_the_same_model_in_all_pairs(good):
    for pair in (("hf", "megatron"), ("megatron", "hf"), ("hf", "back"), ("megatron", "megatron")):
        report = check(good / pair[0], good / pair[1])
        assert report["same"], report
        assert report["facts"]["tensors"] == 39 and report["facts"]["weights_digest_a"] == report["facts"]["weights_digest_b"]


@pytest.mark.parametrize("family", FAMILIES)
def test_both_forwards_are_transformers_at_far_positions(family, tmp_path):
    source = make_family(family, tmp_path / "hf")
    convert("to megatron", source, tmp_path / "megatron")
    sides = open_side(source), open_side(tmp_path / "megatron")
    positions = sample_positions(sides[0].config["max_position_embeddings"])
    tokens = torch.randint(0, 500, (len(positions),), generator=torch.Generator().manual_seed(5))
    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").float().eval()
    mask = torch.full((len(positions),) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
    with torch.no_grad():
        expected = model(input_ids=tokens[None], position_ids=positions[None], attention_mask=mask, use_cache=False).logits[0]
    assert relative_error(logits_of(sides[0], tokens, positions), expected).max() < 1e-5
    assert (relative_error(logits_of(sides[1], tokens, positions), expected) < tolerance(positions)).all()


def swap_q_and_k(name, rows):
    if not name.endswith("linear_qkv.weight"):
        return rows
    grouped = rows.reshape(2, 4, 16, -1).clone()  # two groups of (two query heads, key, value)
    grouped[:, [1, 2]] = grouped[:, [2, 1]]
    return grouped.reshape(rows.shape)


def not_interleaved(name, rows):
    """q, k, v one after another, as in Hugging Face."""
    if not name.endswith("linear_qkv.weight"):
        return rows
    grouped = rows.reshape(2, 4, 16, -1)
    return torch.cat([grouped[:, :2].reshape(64, -1), grouped[:, 2].reshape(32, -1), grouped[:, 3].reshape(32, -1)])


def gate_and_up_swapped(name, rows):
    return torch.cat(list(rows.chunk(2))[::-1]) if name.endswith("linear_fc1.weight") else rows


def shifted_vocabulary(name, rows):
    """Off-by-one padding: the padding row comes first."""
    return rows.roll(1, 0) if "embedding" in name or "output_layer" in name else rows


def rotary_permuted(name, rows):
    """The permutation of Meta's own files (adjacent pairs), which no side of ours has."""
    if not name.endswith("linear_qkv.weight"):
        return rows
    grouped = rows.reshape(2, 4, 16, -1).clone()
    grouped[:, :3] = grouped[:, :3].reshape(2, 3, 2, 8, -1).transpose(2, 3).reshape(2, 3, 16, -1)
    return grouped.reshape(rows.shape)


PACKING_FAULTS = {
    "Q and K swapped": (swap_q_and_k, "self_attn.q_proj.weight"),
    "missing interleave of QKV": (not_interleaved, "self_attn.q_proj.weight"),
    "rotary permutation of Meta's files": (rotary_permuted, "self_attn.q_proj.weight"),
    "gate and up swapped": (gate_and_up_swapped, "mlp.gate_proj.weight"),
    "padding off by one": (shifted_vocabulary, "model.embed_tokens.weight"),
}


@pytest.mark.parametrize("fault", PACKING_FAULTS)
def test_packing_faults_are_named_by_tensors_and_by_logits_alone(fault, good, tmp_path, monkeypatch):
    change, name = PACKING_FAULTS[fault]
    rearranged(monkeypatch, good, tmp_path / "bad", change)
    report = check(good / "hf", tmp_path / "bad")
    assert name in report["checks"]["tensors"][0], report["checks"]
    assert not report["checks"]["metadata"]
    assert report["checks"]["logits"] and report["facts"]["logit_worst_relative_error"] > 0.1


def test_the_same_fault_twice_shows_in_logits(good, tmp_path, monkeypatch):
    """A converter that is wrong in both directions passes a comparison of tensors through itself. Logits know better."""
    rearranged(monkeypatch, good, tmp_path / "bad", not_interleaved)
    a, b = open_side(good / "hf"), open_side(tmp_path / "bad")
    assert not compare_logits(a, b).same


ROPE_FAULTS = {
    "factor": lambda config: config["rope_parameters"].update(factor=4.0),
    "theta": lambda config: config["rope_parameters"].update(rope_theta=400000.0),
    "scaling dropped": lambda config: config.update(rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
}


@pytest.mark.parametrize("fault", ROPE_FAULTS)
@pytest.mark.parametrize("against", ["hf", "megatron"])
def test_wrong_rope_is_named_and_shows_in_logits(fault, against, good, tmp_path):
    shutil.copytree(good / "back", tmp_path / "bad")
    edit_json(tmp_path / "bad/config.json", ROPE_FAULTS[fault])
    report = check(good / against, tmp_path / "bad")
    assert "config rope" in report["checks"]["metadata"][0] and not report["checks"]["tensors"]
    assert report["checks"]["logits"] and report["facts"]["logit_worst_relative_error"] > 0.01
    errors = dict(zip(report["facts"]["logit_positions"], report["facts"]["logit_relative_error"], strict=True))
    assert errors[0] < 1e-4, "and only where the rope matters"


def test_wrong_facts_of_the_megatron_checkpoint_show(good, tmp_path):
    shutil.copytree(good / "megatron", tmp_path / "bad")
    for section in ("rope", "hf_config"):

        def change(content, section=section):
            content[section] = {**content[section], **({"theta": 1e4} if section == "rope" else {})}
            if section == "hf_config":
                content[section]["rope_parameters"]["rope_theta"] = 1e4

        edit_json(tmp_path / "bad" / FACTS, change)  # fmt: skip
    report = check(good / "hf", tmp_path / "bad")
    assert "config rope" in report["checks"]["metadata"][0] and report["checks"]["logits"]


def test_a_window_that_is_the_training_length_is_named(good, tmp_path):
    shutil.copytree(good / "back", tmp_path / "bad")
    edit_json(tmp_path / "bad/config.json", lambda config: config.update(max_position_embeddings=8192))
    report = check(good / "megatron", tmp_path / "bad")
    assert report["checks"]["metadata"] == ["config max_position_embeddings: 131072 against 8192"] and not report["checks"]["tensors"]


def test_one_number_is_named(good, tmp_path):
    shutil.copytree(good / "back", tmp_path / "bad")

    def change(tensors):
        if "model.layers.2.mlp.up_proj.weight" in tensors:
            tensors["model.layers.2.mlp.up_proj.weight"][150, 7] += 1e-7

    edit_shards(tmp_path / "bad", change)
    for other in ("hf", "megatron"):
        report = check(good / other, tmp_path / "bad")
        assert len(report["checks"]["tensors"]) == 1
        line = report["checks"]["tensors"][0]
        assert line.startswith("model.layers.2.mlp.up_proj.weight: ") and "[150, 7]" in line


def test_dropped_bias_is_named(good, tmp_path):
    shutil.copytree(good / "hf", tmp_path / "bad")

    def change(tensors):
        if "model.layers.1.self_attn.q_proj.weight" in tensors:
            tensors["model.layers.1.self_attn.q_proj.bias"] = torch.ones(64)

    edit_shards(tmp_path / "bad", change)
    edit_json(
        tmp_path / "bad/model.safetensors.index.json",
        lambda index: index["weight_map"].update({
            "model.layers.1.self_attn.q_proj.bias": index["weight_map"]["model.layers.1.self_attn.q_proj.weight"],
        }),
    )  # fmt: skip
    report = check(tmp_path / "bad", good / "megatron")
    assert report["checks"]["tensors"][0].startswith("model.layers.1.self_attn.q_proj.bias: only in")


def test_stale_shard_is_named_even_against_itself(good, tmp_path):
    """A shard of another training step, of the same size and shapes."""
    other = make_family(FAMILY, tmp_path / "other", dtype=torch.float32, seed=1)
    shutil.copytree(good / "back", tmp_path / "bad")
    stale = sorted(other.glob("*.safetensors"))[1]
    shutil.copy(stale, tmp_path / "bad" / stale.name)
    names = sorted(load_file(stale))
    report = check(good / "hf", tmp_path / "bad", tensors_only=True)
    assert {line.partition(":")[0] for line in report["checks"]["tensors"]} == set(names)
    report = check(tmp_path / "bad", tmp_path / "bad", tensors_only=True)
    assert {line.partition(":")[0] for line in report["checks"]["tensors"]} == set(names), "the recorded digests tell"


def test_stale_part_of_a_megatron_checkpoint(good, tmp_path):
    shutil.copytree(good / "megatron", tmp_path / "bad")
    path = tmp_path / "bad/__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert len(check(good / "hf", tmp_path / "bad", tensors_only=True)["checks"]["tensors"]) >= 1


def test_padding_is_no_difference_unless_it_is_not_zero(good, tmp_path, monkeypatch):
    convert("to megatron", good / "hf", tmp_path / "padded", vocabulary_multiple=1000)
    assert check(good / "hf", tmp_path / "padded")["same"] and check(good / "megatron", tmp_path / "padded")["same"]

    def garbage(name, rows):
        if name.startswith("embedding"):
            rows[512:] = 1.0
        return rows

    rearranged(monkeypatch, good, tmp_path / "garbage", garbage, vocabulary_multiple=1000)
    found = check(good / "hf", tmp_path / "garbage")["checks"]["tensors"]
    assert found[0].startswith("embedding.word_embeddings.weight: ") and "[512, 0]" in found[0]


def test_cast_compares_in_the_narrower_dtype(good, tmp_path):
    convert("to huggingface", good / "megatron", tmp_path / "bf16", dtype="bf16")
    report = check(good / "hf", tmp_path / "bf16", tensors_only=True)
    assert "dtype F32 against BF16" in report["checks"]["tensors"][0]
    assert check(good / "hf", tmp_path / "bf16", cast=True, tensors_only=True)["same"]


def test_command(good, tmp_path):
    def command(*arguments):
        script = [sys.executable, str(ROOT / "tools/verify_checkpoint.py"), *map(str, arguments)]
        return subprocess.run(script, capture_output=True, text=True, cwd=ROOT)

    done = command(good / "hf", good / "megatron", "--report", tmp_path / "report.json", "--positions", "0,1,2,131071")
    assert done.returncode == 0, done.stderr
    assert "tensors: the same" in done.stdout and "39 tensors" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["same"] and report["facts"]["logit_positions"] == [0, 1, 2, 131071]
    other = make_family(FAMILY, tmp_path / "other", dtype=torch.float32, seed=1)
    done = command(other, good / "back")
    assert done.returncode == 1 and "model.embed_tokens.weight: " in done.stdout and "Traceback" not in done.stderr
