"""Memory of ds_train.py's ranks: predictions against real peaks, autograd's own saved tensors, and the arithmetic of ZeRO."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from endprompt.models.architectures import architecture_of_config, get_architecture
from endprompt.planning import Cluster, make_plan
from endprompt.planning.cluster import cpu_cluster
from endprompt.planning.zero3_memory import saved_bytes, zero3_memory
from endprompt.recipe import load_recipe
from endprompt.training.hardware import CPU_ALLOCATOR
from endprompt.training.launch import launch
from tests.support.memory_rank import saved_by_autograd
from tests.support.tiny import make_tiny_checkpoint
from tests.support.workspace import ROOT, Workspace

SITUATIONS = {name: json.loads((ROOT / "deepspeed_configs" / f"{name}.json").read_text()) for name in
              ("zero3", "zero3_offload_optimizer", "zero3_offload")}  # fmt: skip
STATES_HEAVY = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4,
    "vocab_size": 8192,
}  # fmt: skip
ACTIVATIONS_HEAVY = {
    "hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
    "vocab_size": 2048,
}  # fmt: skip
RUNS = {
    # 50 M parameters, recomputation, and samples as short as can be (bf16 is slow on a CPU without AVX-512): states, gathered weights
    # and buckets are nearly all of it.
    "states, bf16": (STATES_HEAVY, {"physical_length": 64}, {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 2}),
    # 11 M parameters, 2 x 1536 tokens, nothing recomputed: activations are most of it.
    "activations, fp32": (
        ACTIVATIONS_HEAVY,
        {"physical_length": 1536},
        {"precision": "fp32", "micro_batch_size": 2, "global_batch_size": 4, "activation_checkpointing": False},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_predicted_peak_is_within_10_percent_of_the_real_one(tmp_path, monkeypatch, name):
    """Two ranks over gloo, two steps through ds_train.py's own functions (tests/support/memory_rank.py)."""
    shape, positions, training = RUNS[name]
    workspace = Workspace(tmp_path)
    make_tiny_checkpoint(workspace.model, max_position_embeddings=128, **shape)
    raw = yaml.safe_load(workspace.recipe_file.read_text())
    raw["target_length"] = 8192
    raw["positions"].update(positions)
    raw["training"].update(training, steps=2, warmup_steps=1)
    raw["data"].pop("validation")
    workspace.recipe_file.write_text(yaml.safe_dump(raw))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for variable in CPU_ALLOCATOR:  # it is the allocator's habit and no need of the training
        monkeypatch.setenv(variable, "")
    monkeypatch.chdir(ROOT)
    script, out = ROOT / "tests/support/memory_rank.py", tmp_path / "out"
    assert launch(2, [sys.executable, str(script), str(workspace.recipe_file), str(out)]) == 0

    plan = make_plan(load_recipe(workspace.recipe_file), "deepspeed", cpu_cluster(2))
    for rank in range(2):
        measured = json.loads(Path(f"{out}.{rank}.json").read_text())["peak_gb"]
        print(f"{name}: rank {rank} measured {measured:.3f} GB, predicted {plan.memory.total_gb:.3f} ({plan.memory.peak_phase})")
        assert plan.memory.total_gb == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_layer_saves_is_what_autograd_saves(tmp_path, dtype):
    """Unique storages that autograd keeps of one transformers layer, less weights and its input."""
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=704, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=2,
        rope_theta=10000.0,
    )  # fmt: skip
    from endprompt.zero3.attention import SDPA

    config._attn_implementation = SDPA
    model = LlamaModel(config).to(dtype)
    layer, tokens = model.layers[0], 512
    hidden = torch.randn(1, tokens, 256, dtype=dtype, requires_grad=True)
    cos_sin = model.rotary_emb(hidden, torch.arange(tokens)[None])
    apart = {tensor.untyped_storage().data_ptr() for tensor in (hidden, *cos_sin, *layer.parameters())}
    forward = partial(layer, hidden, attention_mask=None, position_embeddings=cos_sin, position_ids=None)
    measured = saved_by_autograd(forward, apart) / tokens
    architecture = architecture_of_config(config.to_dict() | {"rope_theta": 10000.0})
    assert saved_bytes(architecture, dtype.itemsize) == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("nodes, states", [(2, 79.4), (4, 39.7), (8, 19.8), (16, 9.9)])
def test_states_of_70b_are_18_bytes_a_parameter(nodes, states):
    """The table of deepspeed_configs: worked out there by hand."""
    memory = zero3_memory(get_architecture("llama3_70b"), 8192, 1, Cluster(nodes), SITUATIONS["zero3"])
    parts = memory.parts_gb
    assert parts["weights"] + parts["gradients"] + parts["optimizer"] == pytest.approx(states, abs=0.06)
    assert parts["activations"] == pytest.approx(81 * 8192 * 8192 * 2 / 1e9) and memory.host_gb == 0


def test_offloading_moves_states_to_the_host():
    llama = get_architecture("llama3_70b")
    here, optimizer, all_out = (zero3_memory(llama, 8192, 1, Cluster(2), SITUATIONS[name]) for name in SITUATIONS)
    share = llama.parameters / 16 / 1e9
    assert "optimizer" not in optimizer.parts_gb and "gradients" not in optimizer.parts_gb and "weights" not in all_out.parts_gb
    assert (optimizer.host_gb, all_out.host_gb) == (pytest.approx(20 * share), pytest.approx(22 * share))
    assert here.total_gb > optimizer.total_gb > all_out.total_gb
