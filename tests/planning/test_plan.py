"""Plans, searches and the tool: monotone where they must be, layouts that are the best, remedies that work, clear refusals."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from pathlib import Path

import pytest

from endprompt.errors import UserError, run_command
from endprompt.planning import Cluster, make_plan
from endprompt.planning.cluster import cpu_cluster
from endprompt.planning.comparison import compare
from endprompt.planning.search import ROOM, fewest_nodes, full_length, remedy, search
from endprompt.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "plan.py"
NODES = {"8b": 1, "70b": 8}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def recipe(name: str, **overrides):
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", [f"{field}={value}" for field, value in overrides.items()])


@pytest.fixture
def tool(monkeypatch, capsys):
    """The tool in this process: exit code, stdout, stderr."""
    specification = importlib.util.spec_from_file_location("plan_tool", TOOL)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            run_command(module.main)
        return left.value.code, *capsys.readouterr()

    return call


def test_more_of_anything_never_costs_less():
    """Property: over random recipes, memory and time grow with length, batch and size; ZeRO-3's memory falls with GPUs."""
    draw = random.Random(3)
    for _ in range(60):
        size, nodes = draw.choice(["8b", "70b"]), draw.choice([1, 2, 4, 8])
        length, micro = 2 ** draw.randint(10, 15), draw.choice([1, 2])
        fields = {"positions.physical_length": length, "training.micro_batch_size": micro, "training.global_batch_size": 128}
        engine = draw.choice(["deepspeed", "megatron"])
        layout = {"megatron.tensor_parallel": draw.choice([2, 8]), "megatron.context_parallel": 1} if engine == "megatron" else {}
        layout |= {"megatron.pipeline_parallel": 1, "megatron.virtual_pipeline": 1} if engine == "megatron" else {}

        def plan(name=size, engine=engine, nodes=nodes, base={**fields, **layout}, **changes):  # noqa: B006
            return make_plan(recipe(f"llama3_{name}_64k", **{**base, **changes}), engine, Cluster(nodes))

        here = plan()
        for grown in (
            plan(**{"positions.physical_length": 2 * length}),
            plan(**{"training.micro_batch_size": 2 * micro, "training.global_batch_size": 256}),
            *([plan(name="70b")] if size == "8b" else []),
        ):
            assert grown.memory.total_gb >= here.memory.total_gb and grown.step_seconds > here.step_seconds
        assert plan(**{"positions.physical_length": 2 * length}).flops_per_token > here.flops_per_token
        twice = plan(nodes=2 * nodes, **{"training.global_batch_size": 256})
        assert twice.memory.total_gb <= here.memory.total_gb and twice.tokens_per_second > here.tokens_per_second
        assert 0 < here.mfu < 0.62 and here.memory.total_gb == pytest.approx(sum(here.memory.parts_gb.values()))


def test_discounts_are_those_worked_out_by_hand():
    """spec/peers.md: causal FLOPs, 8K physical against full length."""
    hand = {("8b", 64): (1.88, 15), ("8b", 128): (2.88, 46), ("8b", 256): (4.88, 156)}
    hand |= {("70b", 64): (1.50, 12), ("70b", 128): (2.08, 33), ("70b", 256): (3.22, 103)}
    for (size, k), (per_token, per_sample) in hand.items():
        found = compare(make_plan(recipe(f"llama3_{size}_{k}k"), "megatron", Cluster(NODES[size])))
        assert found.per_token == pytest.approx(per_token, abs=0.006) and found.per_sample == pytest.approx(per_sample, abs=0.5)
        assert found.wall_clock > per_token  # recomputation and messages of long samples come on top
        assert found.full.recipe.tokens_per_step == found.plan.recipe.tokens_per_step


@pytest.mark.parametrize("size", NODES)
@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("ending", ["", "_full"])
def test_layouts_of_the_recipes_are_the_planners_and_fit(size, k, ending):
    written = recipe(f"llama3_{size}_{k}k{ending}")
    cluster = Cluster(NODES[size])
    plan = make_plan(written, "megatron", cluster)
    best = search(written, "megatron", cluster, micro_batches=(written.training.micro_batch_size,), best=1)[0].plan
    assert plan.memory.total_gb <= ROOM * 80 and plan.step_seconds <= 1.01 * best.step_seconds
    text = (ROOT / "recipes" / f"{written.name}.yaml").read_text()
    block = text[text.index("# 8 GPUs = " if size == "8b" else "# 64 GPUs = ") :]
    stated = float(re.search(r"runtime 3 GB[^:]*: (\d+) GB", block.replace("\n#", "").replace("\n  #", ""))[1])
    assert stated == pytest.approx(plan.memory.total_gb, abs=0.6)


@pytest.mark.parametrize("size, k", [("8b", 64), ("70b", 256)])
def test_full_recipes_are_the_counterparts(size, k):
    short, full = recipe(f"llama3_{size}_{k}k"), recipe(f"llama3_{size}_{k}k_full")
    made = full_length(short)
    assert (full.positions.scheme, full.positions.physical_length) == ("full", full.target_length)
    assert full.training.global_batch_size == made.training.global_batch_size and full.steps == short.steps == 1907
    for field in ("model", "rope", "target_length"):
        assert getattr(full, field) == getattr(short, field)
    assert full.training.learning_rate == short.training.learning_rate


def test_the_remedy_of_a_plan_that_does_not_fit_makes_it_fit():
    for engine, name, nodes in (("deepspeed", "llama3_70b_128k", 2), ("megatron", "llama3_8b_64k", 1)):
        overrides = {} if engine == "deepspeed" else {"megatron.tensor_parallel": 1, "megatron.context_parallel": 1}
        plan = make_plan(recipe(name, **overrides), engine, Cluster(nodes))
        assert not plan.fits
        changes = dict(word.split("=", 1) for word in re.findall(r"--set (\S+)", remedy(plan)))
        mended = make_plan(recipe(name, **{**overrides, **changes}), engine, Cluster(nodes))
        assert changes and mended.fits


def test_a_remedy_can_be_more_nodes_and_is_honest_when_there_is_none():
    cut = {"megatron.tensor_parallel": 8, "megatron.pipeline_parallel": 1, "megatron.virtual_pipeline": 1, "megatron.context_parallel": 1}
    words = remedy(make_plan(recipe("llama3_70b_64k", **cut), "megatron", Cluster(1)))
    assert "no layout fits on these nodes; use --nodes" in words
    plan = make_plan(recipe("llama3_8b_64k"), "deepspeed", cpu_cluster(8, memory_gb=1.0))
    assert "no layout fits" in remedy(plan)


def test_host_memory_counts_too():
    offloaded = recipe("llama3_70b_64k", **{"deepspeed.config": "deepspeed_configs/zero3_offload.json"})
    assert make_plan(offloaded, "deepspeed", Cluster(1)).fits
    small = make_plan(offloaded, "deepspeed", Cluster(1, host_memory_gb=1000.0))
    assert not small.fits and small.memory.total_gb < 80 and "host memory" in remedy(small)


def test_fewest_nodes():
    assert fewest_nodes(recipe("llama3_8b_64k"), "deepspeed", Cluster(1)) == 1
    assert fewest_nodes(recipe("llama3_70b_64k"), "deepspeed", Cluster(1)) == 4
    with pytest.raises(UserError, match="fits on no number of nodes"):
        fewest_nodes(recipe("llama3_8b_64k"), "deepspeed", Cluster(1, memory_gb=5.0))


def test_json_has_what_others_read_and_says_what_is_predicted(tool):
    code, out, _ = tool("recipes/llama3_70b_128k.yaml", "--nodes", 8, "--json", "--price-per-gpu-hour", 2)
    found = json.loads(out)
    assert code == 0 and found["fits"] is True and found["remedy"] is None
    assert found["flops_per_token"] == pytest.approx(449.2e9, rel=1e-3)
    assert found["full_length"]["flops_per_token"] / found["flops_per_token"] == pytest.approx(found["discount"]["per_token"], rel=1e-4)
    assert found["discount"]["per_sample"] == pytest.approx(16 * found["discount"]["per_token"], rel=1e-4)
    assert found["gpu_hours"] == pytest.approx(64 * found["step_seconds"] * 1907 / 3600, rel=1e-3)
    assert found["cost"] == pytest.approx(2 * found["gpu_hours"], rel=1e-3) and found["checkpoint_gb"] == pytest.approx(988, abs=1)
    assert found["memory_gb_per_gpu"] == pytest.approx(sum(found["memory"]["parts_gb"].values()), abs=0.02)
    assert {"fits", "memory_gb_per_gpu", "gpu_hours", "step_seconds", "discount.wall_clock"} <= set(found["predicted"])
    assert found["held_out_error"]["rows"] == 18


def test_text_labels_predictions_and_names_the_error(tool):
    code, out, _ = tool("recipes/llama3_70b_128k.yaml", "--nodes", 8, "--engine", "megatron")
    assert code == 0 and "~ predicted, nothing of it was measured" in out
    assert "20 of 20 published H100 rows that were held out are met within 15 %" in out
    assert all(line.startswith("~") for line in out.splitlines() if "GPU-hours" in line)


def test_search_proposes_and_applies_the_best(tool):
    code, out, _ = tool("recipes/llama3_70b_128k.yaml", "--nodes", 4, "--engine", "megatron", "--search", "--json")
    found = json.loads(out)
    assert code == 0 and found["fits"] and found["layout"] == found["search"][0]["layout"]
    times = [proposal["step_seconds"] for proposal in found["search"]]
    assert times == sorted(times) and all(proposal["memory_gb_per_gpu"] <= 72 for proposal in found["search"])
    flags = [part for field, value in found["search"][0]["set"].items() for part in ("--set", f"{field}={value}")]
    again = json.loads(tool("recipes/llama3_70b_128k.yaml", "--nodes", 4, "--engine", "megatron", "--json", *flags)[1])
    assert again["step_seconds"] == found["step_seconds"] and again["memory_gb_per_gpu"] == found["memory_gb_per_gpu"]


def test_what_does_not_fit_says_what_to_change(tool):
    code, out, _ = tool("recipes/llama3_70b_128k.yaml", "--nodes", 2)
    assert code == 0 and "DOES NOT FIT: needs" in out and "--set deepspeed.config=deepspeed_configs/zero3_offload" in out


def test_plot(tool, tmp_path):
    code, out, _ = tool("recipes/llama3_8b_64k.yaml", "--plot", tmp_path / "plan.png")
    assert code == 0 and (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG") and "plot: " in out


def test_the_table_in_the_readme_is_the_commands(tool):
    files = [f"recipes/llama3_{size}_{k}k.yaml" for size in NODES for k in (64, 128, 256)]
    code, out, _ = tool("--table", "--engine", "megatron", *files)
    assert code == 0 and out.strip() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "RECIPE: is missing"),
        (("recipes/llama3_8b_64k.yaml", "recipes/llama3_8b_96k.yaml"), "2 are named"),
        (("recipes/llama3_8b_64k.yaml", "--nodes", "0"), "--nodes: is 0"),
        (("recipes/llama3_8b_64k.yaml", "--price-per-gpu-hour", "-1"), "--price-per-gpu-hour: is -1"),
        (("recipes/llama3_8b_64k.yaml", "--plot", "plan.jpg"), "does not end in"),
        (("recipes/absent.yaml",), "no such recipe"),
        (("recipes/llama3_70b_64k.yaml", "--nodes", "16"), "recipes/llama3_70b_64k.yaml: training.global_batch_size: 64 does not divide"),
        (
            ("recipes/llama3_70b_64k.yaml", "--nodes", "8", "--engine", "megatron", "--set", "megatron.pipeline_parallel=3"),
            "recipes/llama3_70b_64k.yaml: megatron.pipeline_parallel: 3 does not divide the layers 80",
        ),
        (("--table", "recipes/llama3_8b_32k.yaml"), "has no counterpart llama3_8b_32k_full.yaml"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(tool, arguments, words):
    code, out, err = tool(*arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_tensor_parallel_beyond_a_node_is_refused():
    wide = recipe("llama3_70b_64k", **{"megatron.tensor_parallel": 8})
    with pytest.raises(UserError, match="reaches beyond the 4 GPUs of a node"):
        make_plan(wide, "megatron", Cluster(16, gpus_per_node=4))
