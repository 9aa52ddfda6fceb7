"""Converted checkpoints in real GPTModels at four layouts: the logits are transformers', and they come back bit-equal."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from endprompt.checkpoint.conversion import run
from endprompt.checkpoint.megatron_metadata import FACTS
from endprompt.checkpoint.to_huggingface import plan_to_huggingface
from endprompt.checkpoint.to_megatron import plan_to_megatron
from tests.support.checkpoints import make_family
from tests.support.warm import launch_ranks

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
LOADED = ["llama2 (MHA)", "llama3 (GQA)", "llama3.1", "llama3.2 (tied)", "mistral (wide heads)"]


def convert(plan) -> None:
    run(plan, workers=2, resume=False, quiet=True)


def folder_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Everything that the four processes do, at once: starting them takes longer than the work. Returns the folder."""
    place, jobs = tmp_path_factory.mktemp("world"), []
    torch.save(torch.randint(0, 500, (2, 24), generator=torch.Generator().manual_seed(3)), place / "tokens.pt")
    for number, family in enumerate(LOADED):
        source, checkpoint = make_family(family, place / f"{number}"), place / f"{number}-megatron"
        convert(plan_to_megatron(source, checkpoint))
        for tensor, pipeline in LAYOUTS:
            jobs.append({
                "checkpoint": str(checkpoint), "config": str(source / "config.json"), "tensor": tensor, "pipeline": pipeline,
                "tokens": str(place / "tokens.pt"), "logits": str(place / f"{number}-tp{tensor}pp{pipeline}.pt"), "metadata": {},
                "save": None,
            })  # fmt: skip
        jobs.append({**jobs[-1], "logits": None, "save": str(place / f"{number}-saved")})
    numbered = {"singleton_local_shards": True}  # Megatron's other way of naming layers; loading does not tell it by itself
    jobs.append({**jobs[4], "checkpoint": jobs[4]["save"], "save": str(place / "0-again"), "save_metadata": numbered})
    (place / "jobs.json").write_text(json.dumps(jobs))
    assert launch_ranks("megatron", 4, "megatron_world.py", place / "jobs.json") == 0
    return place


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"TP{layout[0]} PP{layout[1]}")
@pytest.mark.parametrize("family", LOADED)
def test_logits_are_those_of_transformers(world, family, layout):
    number = LOADED.index(family)
    model = AutoModelForCausalLM.from_pretrained(world / f"{number}", attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model.float()(input_ids=torch.load(world / "tokens.pt")).logits
    logits = torch.load(world / f"{number}-tp{layout[0]}pp{layout[1]}.pt")
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.parametrize("family", LOADED)
def test_back_from_tp2_pp2_after_a_step_of_learning_rate_0(world, family, tmp_path):
    number = LOADED.index(family)
    source, saved = world / f"{number}", world / f"{number}-saved"
    convert(plan_to_huggingface(saved, tmp_path / "back", hf_config=source, dtype=None))
    assert_same_tensors(source, tmp_path / "back")


def assert_same_tensors(source, back):
    mine, theirs = folder_tensors(source), folder_tensors(back)
    assert mine.keys() == theirs.keys()
    for name in mine:
        cast = theirs[name].to(mine[name].dtype)  # Megatron's local norm keeps its weights in fp32
        assert torch.equal(mine[name], cast), name


def test_composed_twice_through_megatron(world, tmp_path):
    """HF -> Megatron -> TP2 PP2 -> Megatron -> TP2 PP2 -> HF -> Megatron -> HF."""
    source = world / "0"
    convert(plan_to_huggingface(world / "0-again", tmp_path / "a", hf_config=source))
    convert(plan_to_megatron(tmp_path / "a", tmp_path / "b"))
    convert(plan_to_huggingface(tmp_path / "b", tmp_path / "c"))
    assert_same_tensors(source, tmp_path / "c")
    for shard in source.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "c" / shard.name).read_bytes()
    assert (tmp_path / "b" / FACTS).is_file()
