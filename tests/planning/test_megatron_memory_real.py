"""Memory of the Megatron engine's ranks: predictions against real peaks of small models on CPUs, at several layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from endprompt.planning import Plan, make_plan
from endprompt.planning.cluster import cpu_cluster
from endprompt.planning.megatron_memory import activation_bytes
from endprompt.planning.memory import GB, Memory
from endprompt.recipe import load_recipe
from endprompt.training.hardware import CPU_ALLOCATOR
from tests.support.warm import launch_ranks
from tests.support.workspace import Workspace

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="measures a process's memory, and the model would be on the GPU"),
    pytest.mark.timeout(900),  # without AVX-512 the fixture takes two minutes on two free cores, and nearly four within the suite
]

# As small as a 10 % bound allows: without AVX-512, a CPU takes 4 to 80 times as long for a bf16 product as for one in fp32.
LAYERS = {
    "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {
    # 16 M parameters and short samples: states and collectives are nearly all of it.
    "states": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
        "vocab_size": 4096,
    },
    # 1 M parameters and 2048 tokens: activations and loss are most of it; of few words: one recomputed layer.
    # No shorter: half a sample's stream is 256 KiB, and the allocator keeps smaller blocks (memory_rank.return_freed_blocks).
    "activations": {**LAYERS, "vocab_size": 2048},
    "few words": {**LAYERS, "vocab_size": 512},
    # Logits are half of it and more.
    "many words": {"num_hidden_layers": 2, "vocab_size": 16384},
}  # fmt: skip
LENGTHS = {"states": 64, "activations": 1024, "few words": 1024, "many words": 1024}
STATES = {"precision": "bf16", "micro_batch_size": 1, "global_batch_size": 2}
LONG = {"precision": "bf16", "micro_batch_size": 2, "global_batch_size": 2, "activation_checkpointing": False}
RECOMPUTED = {**LONG, "activation_checkpointing": True}
# name: (model, processes that are its ranks, training, megatron). Two of one rank run side by side, each on its core.
RUNS = {
    "TP1 DP1, bf16, full": ("states", [0], STATES, {}),
    "TP1 DP1, fp32, full": ("states", [1], {**STATES, "precision": "fp32"}, {}),
    "long, bf16, none": ("activations", [0], LONG, {}),
    "long, bf16, selective": ("activations", [1], RECOMPUTED, {"recompute": "selective"}),
    "long, bf16, full": ("few words", [1], RECOMPUTED, {}),
    "long, fp32, none": ("activations", [1], {**LONG, "precision": "fp32"}, {}),
    "loss, bf16": ("many words", [0], STATES, {}),
    "loss, fp32": ("many words", [1], {**STATES, "precision": "fp32"}, {}),
    "DP2": ("states", [0, 1], STATES, {}),
    "DP2, whole optimizer": ("states", [0, 1], STATES, {"distributed_optimizer": False}),
    "long, PP2": ("activations", [0, 1], {**LONG, "global_batch_size": 4}, {"pipeline_parallel": 2}),
    "long, TP2 SP": ("activations", [0, 1], LONG, {"tensor_parallel": 2}),
    "long, CP2": ("activations", [0, 1], LONG, {"context_parallel": 2}),
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict[str, tuple[Path, list[dict]]]:
    """Of all RUNS the recipe and what tests/support/megatron_memory_rank.py found on each rank, in two steps over gloo."""
    folder = tmp_path_factory.mktemp("megatron_memory")
    workspaces = {name: Workspace(folder / name, **shape) for name, shape in MODELS.items()}
    jobs = []
    for number, (model, processes, training, megatron) in enumerate(RUNS.values()):
        raw = yaml.safe_load(workspaces[model].recipe_file.read_text())
        raw["target_length"] = 8192
        raw["positions"]["physical_length"] = LENGTHS[model]
        raw["training"].update(training, steps=2, warmup_steps=1)
        raw["data"].pop("validation")
        recipe = folder / f"{number}.yaml"
        recipe.write_text(yaml.safe_dump({**raw, "megatron": megatron}))
        jobs.append({"name": str(number), "processes": processes, "recipe": str(recipe)})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    plain = dict.fromkeys(CPU_ALLOCATOR, "")  # memory that is kept is the allocator's habit and no need of the training
    assert launch_ranks("megatron", 2, "megatron_memory_rank.py", folder / "jobs.json", folder, cold=True, **plain) == 0
    found = {}
    for name, job in zip(RUNS, jobs, strict=True):
        ranks = [json.loads((folder / f"{job['name']}.{rank}.json").read_text()) for rank in range(len(job["processes"]))]
        found[name] = (Path(job["recipe"]), ranks)
    return found


def predictions(recipe: Path, ranks: int) -> tuple[Plan, list[tuple[str, Memory]]]:
    """And stage and memory of each rank; under pipeline parallelism the ranks here are its two ends."""
    plan = make_plan(load_recipe(recipe), "megatron", cpu_cluster(ranks, engine="megatron"))
    stages = ["the only stage"] * ranks if plan.layout.pipeline == 1 else ["first stage", "last stage"]
    phases = plan.memory.phases
    each = [(stage, Memory({phase: parts for phase, parts in phases.items() if phase.startswith(stage)})) for stage in stages]
    assert plan.memory.total_gb == max(memory.total_gb for _, memory in each)
    return plan, each


@pytest.mark.parametrize("name", RUNS)
def test_predicted_peak_is_within_10_percent_of_the_real_one(measured, name):
    recipe, ranks = measured[name]
    for rank, (found, (_, memory)) in enumerate(zip(ranks, predictions(recipe, len(ranks))[1], strict=True)):
        peak = max(found["by"].values())
        error = memory.total_gb / peak - 1
        print(f"{name}: rank {rank} measured {peak:.3f} GB, predicted {memory.total_gb:.3f}, {error:+.1%} ({memory.peak_phase})")
        assert memory.total_gb == pytest.approx(peak, rel=0.10)


@pytest.mark.parametrize("name", ["long, bf16, none", "long, fp32, none", "long, TP2 SP", "long, CP2"])
def test_what_is_kept_for_backward_is_what_autograd_saves(measured, name):
    """All layers', the softmax in fp32, and of the final norm what a layer's norm keeps."""
    recipe, ranks = measured[name]
    plan, _ = predictions(recipe, len(ranks))
    a, layout, training, length = plan.architecture, plan.layout, plan.recipe.training, plan.recipe.positions.physical_length
    w, stream = (2, layout.tensor) if training.precision == "bf16" else (4, 1)
    layer, _, _ = activation_bytes(a, length, training.micro_batch_size, layout, "none", w, fused=False)
    norm, tokens = 10 if w == 2 else 12, training.micro_batch_size * length / layout.context
    expected = a.layers * layer + tokens * (4 * a.vocab_size / layout.tensor + norm * a.hidden_size / stream)
    for found in ranks:
        print(f"{name}: saved {found['saved']:.4f} GB, expected {expected / GB:.4f}")
        assert expected / GB == pytest.approx(found["saved"], rel=0.03)


def test_selective_recomputation_saves_nothing_where_attention_holds_no_scores(measured):
    """Its output is the input of the next product, so that stays; recomputing it costs time only."""
    selective, none = (max(measured[f"long, bf16, {name}"][1][0]["by"].values()) for name in ("selective", "none"))
    assert selective == pytest.approx(none, rel=0.03)


@pytest.mark.parametrize("name", RUNS)
def test_loading_and_building_need_what_is_predicted_for_them(measured, name):
    """Reading: the rank's weights and one tensor of the file. Building: two copies of the weights, or one and the masters."""
    recipe, ranks = measured[name]
    plan, each = predictions(recipe, len(ranks))
    tensor = 4 * max(plan.architecture.embedding_parameters, plan.architecture.hidden_size * plan.architecture.ffn_size)  # fp32
    for found, (stage, memory) in zip(ranks, each, strict=True):
        by, states, built = found["by"], memory.phases[stage], memory.phases[f"{stage}, built"]
        masters = states["optimizer"] / 3 if plan.recipe.training.precision == "bf16" else 0.0
        both = built["gradients"] + max(built["weights"], states["weights"] + masters)
        small = 1.5e6  # Python's own objects and the allocator's last pages, of 6 MB in the smallest
        assert by["load"] <= (states["weights"] + tensor + small) / GB and by["load"] < memory.total_gb
        assert by["engine"] == pytest.approx(both / GB, abs=(0.1 * both + small) / GB) and by["engine"] < memory.total_gb
