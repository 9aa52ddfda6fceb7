"""The shipped recipes: they load, hold the paper's hyper-parameters, and the arithmetic in their comments is right."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from endprompt.models.architectures import get_architecture, training_flops_per_token
from endprompt.recipe import Recipe, load_recipe
from endprompt.rope import scaling_for
from endprompt.zero3.config import micro_steps_per_step, read_situation

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
PAPER = {
    **{f"llama3_8b_{k}k": ("llama3_8b", k * 1024, k // 8) for k in (32, 64, 96, 128, 256)},
    **{f"llama3_70b_{k}k": ("llama3_70b", k * 1024, k // 8) for k in (64, 128, 256)},
    "llama2_7b_64k": ("llama2_7b", 65536, 16),
    "mistral_7b_64k": ("mistral_7b", 65536, 2),
}


@pytest.fixture(params=PAPER)
def recipe(request, monkeypatch) -> Recipe:
    for name in ("CHECKPOINTS", "DATA", "RUNS"):
        monkeypatch.delenv(name, raising=False)
    return load_recipe(FOLDER / f"{request.param}.yaml")


def comments(recipe: Recipe) -> str:
    lines = (FOLDER / f"{recipe.name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def test_every_recipe_loads_and_is_named_like_its_file():
    for file in FOLDER.glob("*.yaml"):
        assert load_recipe(file).name == file.stem


def test_hyper_parameters_of_the_paper(recipe):
    architecture, target, factor = PAPER[recipe.name]
    facts = get_architecture(architecture)
    assert (recipe.model.architecture, recipe.model.original_length) == (architecture, facts.original_length)
    assert (recipe.target_length, recipe.rope.type, recipe.rope_factor) == (target, "linear", factor)
    assert (recipe.positions.scheme, recipe.positions.physical_length, recipe.positions.displaced_length) == ("endprompt", 8192, 20)
    assert [prompt.name for prompt in recipe.positions.prompts] == ["EP_1"] and recipe.positions.prompt_loss_weight == 1
    training = recipe.training
    assert (training.tokens, training.global_batch_size, recipe.tokens_per_step, recipe.steps) == (10**9, 64, 524288, 1907)
    assert (training.learning_rate, training.warmup_steps, training.weight_decay) == (2e-5, 20, 0)
    assert (training.schedule, training.beta1, training.beta2, training.epsilon) == ("constant_with_warmup", 0.9, 0.999, 1e-8)
    assert scaling_for(recipe, facts.rope).factor == factor


def test_paths_follow_the_environment(recipe, monkeypatch):
    assert recipe.model.path.startswith("checkpoints/") and recipe.output.directory == f"runs/{recipe.name}"
    monkeypatch.setenv("CHECKPOINTS", "/shared/models")
    assert load_recipe(FOLDER / f"{recipe.name}.yaml").model.path.startswith("/shared/models/")


def test_the_batch_divides_on_the_stated_gpus(recipe, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    read_situation(recipe)
    if "70b" in recipe.name:
        assert [micro_steps_per_step(recipe, 8 * nodes) for nodes in (8, 4, 2)] == [1, 2, 4]
        larger = load_recipe(FOLDER / f"{recipe.name}.yaml", ["training.global_batch_size=128"])
        assert (micro_steps_per_step(larger, 128), larger.steps) == (1, 953)
    else:
        assert [micro_steps_per_step(recipe, 8 * nodes) for nodes in (1, 2)] == [2, 1]
        smaller = load_recipe(FOLDER / f"{recipe.name}.yaml", ["training.micro_batch_size=2"])
        assert micro_steps_per_step(smaller, 32) == 1


def test_the_gap_in_the_comments_is_the_gap_of_the_positions(recipe):
    """Distances between any two positions of eq. 5, by brute force over the far tokens."""
    body, far = np.arange(8172), np.arange(recipe.target_length - 20, recipe.target_length)
    seen = np.zeros(recipe.target_length, dtype=bool)
    seen[body] = True  # within the body, and within the far segment
    seen[(far[:, None] - body[None, :]).ravel()] = True
    gap = np.flatnonzero(~seen)
    text = comments(recipe)
    ends = re.search(r"last 20 tokens at (\d+) \.\. (\d+)", text)
    assert [int(end) for end in ends.groups()] == [far[0], far[-1]]
    first, last, count, share = re.search(r"between (\d+) and (\d+) are never seen .*?: ([\d,]+) of [\d,]+, ([\d.]+) %", text).groups()
    assert (int(first), int(last), int(count.replace(",", ""))) == (gap[0], gap[-1], len(gap))
    assert float(share) == pytest.approx(100 * len(gap) / recipe.target_length, abs=0.05)


def test_memory_and_time_in_the_comments(recipe):
    facts, text = get_architecture(recipe.model.architecture), comments(recipe)
    gpus = 64 if "70b" in recipe.name else 8
    parameters, ranks, states = re.search(r"states 18 B x ([\d.e]+) / (\d+) = ([\d.]+) GB", text).groups()
    assert float(parameters) == pytest.approx(facts.parameters, rel=1e-3) and int(ranks) == gpus
    assert float(states) == pytest.approx(18 * facts.parameters / gpus / 1e9, abs=0.1)
    layers, micro, hidden, kept = re.search(r"activations (\d+) x (?:(\d) x )?8192 x (\d+) x 2 B = ([\d.]+) GB", text).groups()
    assert (int(layers), int(micro or 1), int(hidden)) == (facts.layers, recipe.training.micro_batch_size, facts.hidden_size)
    assert float(kept) == pytest.approx(int(layers) * int(micro or 1) * 8192 * int(hidden) * 2 / 1e9, abs=0.1)
    layer, rest, total = (
        float(re.search(pattern, text)[1])
        for pattern in (r"recomputed layer about ([\d.]+) GB", r"loss about ([\d.]+) GB", r"loss about [\d.]+ GB: ([\d.]+) GB")
    )
    assert total == pytest.approx(float(states) + float(kept) + layer + rest, abs=0.6)
    saved = float(re.search(r"Checkpoint: 14 B x [\d.e]+ = ([\d.]+) GB", text)[1])
    assert saved == pytest.approx(14 * facts.parameters / 1e9, rel=0.01)
    flops, hours = (float(number) for number in re.search(r"([\d.]+) GFLOP a token .* = ([\d.]+) h \(estimate", text).groups())
    assert flops == pytest.approx(training_flops_per_token(facts, 8192) / 1e9, rel=0.002)
    assert hours == pytest.approx(flops * 1e18 / (0.3 * gpus * 989e12) / 3600, abs=0.05)


@pytest.mark.parametrize("recipe", [name for name in PAPER if "70b" in name], indirect=True)
def test_the_table_of_nodes_of_the_70b_recipes(recipe):
    facts, text = get_architecture(recipe.model.architecture), (FOLDER / f"{recipe.name}.yaml").read_text()
    rows = re.findall(r"^# \| +(\d+) \| (\d+) = (\d+) x (\d), +(\d+) steps +\| +([\d.]+) GB \| +(\d+) GB", text, re.M)
    assert [int(row[0]) for row in rows] == [16, 8, 4, 2]
    for nodes, batch, ranks, micro_steps, steps, states, total in rows:
        gpus, per_parameter = 8 * int(nodes), 2 if nodes == "2" else 18
        assert int(ranks) == gpus and int(batch) == gpus * int(micro_steps) and int(steps) == 10**9 // (int(batch) * 8192)
        assert float(states) == pytest.approx(per_parameter * facts.parameters / gpus / 1e9, abs=0.06)
        assert int(total) == pytest.approx(float(states) + 10.7 + 4 + 12.6, abs=0.6)
