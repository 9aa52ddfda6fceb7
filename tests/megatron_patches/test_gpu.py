"""The same command on a GPU: NCCL, bf16, upstream's local layers and Transformer Engine's. Skipped where there is no GPU."""

import importlib.util
import json
import os
import subprocess

import pytest
import torch

from tests.support.workspace import MEGATRON, ROOT, Workspace, losses, quiet_environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, this machine has none"),
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("gpu"), num_hidden_layers=4)
    made.entry = MEGATRON
    return made


@pytest.fixture(scope="module")
def on_cpu(workspace):
    run = workspace.path / "cpu"
    command = workspace.command(ranks=1, **{"output.directory": run, "training.steps": 5})
    environment = {**quiet_environment(), "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return losses(run)


@pytest.mark.parametrize("transformer", ["local", "transformer_engine"])
@pytest.mark.parametrize("scheme", ["endprompt", "pose"])
def test_losses_are_those_of_the_cpu(workspace, on_cpu, transformer, scheme):
    if transformer == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("transformer_engine is not installed")
    if scheme == "pose":
        return _two_tables_agree(workspace, transformer)
    run = workspace.path / f"{transformer}_{scheme}"
    fields = {"output.directory": run, "training.steps": 5, "megatron.transformer": transformer, "training.precision": "bf16"}
    workspace.train(ranks=1, **fields)
    assert losses(run) == pytest.approx(on_cpu, abs=0.05), "bf16 against fp32"
    assert json.loads((run / "status.json").read_text())["exit_code"] == 0
    assert os.path.exists(run / "checkpoints" / "latest")


def _two_tables_agree(workspace, transformer):
    """Per-sample tables at micro-batch 2 equal micro-batches of one, whose table is trivially right."""
    found = []
    for size in (1, 2):
        run = workspace.path / f"{transformer}_micro{size}"
        workspace.train(ranks=1, **{
            "output.directory": run, "training.steps": 5, "megatron.transformer": transformer, "positions.scheme": "pose",
            "training.micro_batch_size": size, "training.precision": "bf16",
        })  # fmt: skip
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], abs=0.02)
