"""A real run of the Megatron engine at TP2 x PP2, exported by the command line: the recipe's window, and proved by the verifier."""

from __future__ import annotations

import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

from endprompt.checkpoint.verification import verify
from endprompt.checkpoint.verify import open_side
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.rope import scaling_for
from tests.support.tiny import make_tiny_checkpoint
from tests.support.workspace import MEGATRON, ROOT, Workspace, quiet_environment


def command(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_export_of_a_run(tmp_path):
    workspace = Workspace(tmp_path)
    make_tiny_checkpoint(workspace.model, num_hidden_layers=2)
    changes = {
        "training.steps": 2, "output.save_interval": 2, "megatron.tensor_parallel": 2, "megatron.pipeline_parallel": 2,
        "training.warmup_steps": 0, "rope.type": "yarn",
    }  # fmt: skip
    workspace.entry = MEGATRON
    workspace.train(ranks=4, **changes)
    said = command("tools/megatron_to_hf.py", "--input", str(tmp_path / "run"), "--output", str(tmp_path / "export"))
    assert "written in" in said
    recipe = workspace.recipe(**changes)
    config = load_hf_config(tmp_path / "export")
    assert config["max_position_embeddings"] == 1024
    assert rope_of_config(config) == scaling_for(recipe, rope_of_config(load_hf_config(workspace.model)))
    assert "Trained for 2 steps" in (tmp_path / "export/README.md").read_text()
    sides = open_side(tmp_path / "run"), open_side(tmp_path / "export")
    report = verify(*sides, cast=False, tensors_only=False, positions=None, quiet=True)
    assert report["same"], report["checks"]
    trained, base = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (tmp_path / "export", workspace.model))
    assert trained.keys() == base.keys() and all(trained[name].shape == base[name].shape for name in base)
    moved = [name for name in base if not torch.equal(trained[name], base[name])]
    assert len(moved) == len(base), "two steps have moved every tensor"
    assert all((trained[name] - base[name]).abs().max() < 0.02 for name in base), "and none far: each is where it belongs"
