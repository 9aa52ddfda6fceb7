"""Loading: every rank reads its own slices, gets the files' numbers, and never holds the whole model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from endprompt.zero3.load import RopeMismatch, _check_rope
from tests.support.tiny import make_tiny_checkpoint
from tests.support.warm import launch_ranks
from tests.support.workspace import Workspace

RANKS = 2
SHAPES = {
    "tied": dict(tie_word_embeddings=True),
    "odd sizes": dict(hidden_size=36, intermediate_size=50, num_attention_heads=3, num_key_value_heads=1, vocab_size=515),
}
# 1.5 GB in bf16: a rank of two that held the whole of it would exceed the bound (half + one slice + 600 MB) by 150 MB.
LARGE = dict(hidden_size=1024, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=8, num_key_value_heads=2, vocab_size=512)


def make_large_checkpoint(directory: Path) -> None:
    """A checkpoint of shape LARGE, one layer a shard, filled with a pattern (random numbers would take a minute)."""
    make_tiny_checkpoint(directory, dtype=torch.bfloat16, **{**LARGE, "num_hidden_layers": 1})
    tiny = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    layer = {name: tensor for name, tensor in tiny.items() if ".layers.0." in name}
    shards = [{name: tensor for name, tensor in tiny.items() if name not in layer}]
    shards += [
        {name.replace(".0.", f".{i}."): torch.roll(tensor, i, 0) for name, tensor in layer.items()}
        for i in range(LARGE["num_hidden_layers"])
    ]
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LARGE["num_hidden_layers"]}))


def load_on_ranks(workspace: Workspace, precision: str, *, cold: bool = False) -> list[dict]:
    recipe, out = workspace.path / "r.yaml", workspace.path / "out"
    recipe.write_text(json.dumps(workspace.recipe(**{"training.precision": precision}).model_dump(mode="json")))
    assert launch_ranks("deepspeed", RANKS, "load_rank.py", recipe, out, cold=cold) == 0
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(RANKS)]


def test_peak_memory_is_the_partition_and_one_slice(tmp_path):
    workspace = Workspace(tmp_path)
    make_large_checkpoint(workspace.model)
    for facts in load_on_ranks(workspace, "bf16", cold=True):
        bound = facts["partition"] + facts["largest_slice"] + 600
        assert facts["different"] == [] and facts["rope_dtype"] == "torch.float32"
        assert facts["grown"] <= bound, facts
        assert facts["whole"] > bound, f"the checkpoint is too small for the bound to say anything: {facts}"


@pytest.mark.parametrize("shape", ["tied", "odd sizes"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loaded_weights_equal_the_files(shape, precision, tmp_path):
    workspace = Workspace(tmp_path)
    make_tiny_checkpoint(workspace.model, dtype=torch.bfloat16, max_shard_size="100KB", **SHAPES[shape])
    (workspace.model / "model.safetensors").unlink()
    for facts in load_on_ranks(workspace, precision):
        assert facts["different"] == [] and facts["names"] >= 28 and facts["rope_dtype"] == "torch.float32"


def test_a_rotary_table_of_another_kind_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    from endprompt.models.hf_config import load_hf_config, rope_of_config

    make_tiny_checkpoint(tmp_path)
    model, rope = AutoModelForCausalLM.from_pretrained(tmp_path), rope_of_config(load_hf_config(tmp_path))
    _check_rope(model, rope)
    rotary = model.get_decoder().rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    with pytest.raises(RopeMismatch, match="bfloat16"):
        _check_rope(model, rope)
    rotary.inv_freq = rotary.inv_freq.float() / 8
    with pytest.raises(RopeMismatch, match="relative error"):
        _check_rope(model, rope)
