"""python -m megatron_patches.train from the outside: against ds_train.py, and under interruption."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest

from tests.support.runs import assert_ranks_say_where_they_stand, kill, kill_during_saves, logged_steps, wait_for
from tests.support.workspace import MEGATRON, ROOT, Workspace, losses, quiet_environment, read_log

STEPS = 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    made = Workspace(tmp_path_factory.mktemp("megatron"), num_hidden_layers=4)
    made.entry = MEGATRON
    return made


@pytest.fixture(scope="module")
def unbroken(workspace):
    run = workspace.path / "unbroken"
    workspace.train(ranks=1, cold=True, **{"output.directory": run})
    return run


def tensors(run, step=STEPS):
    """Every tensor of a checkpoint, weights and optimizer states, by its name on disk."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(run / "checkpoints" / f"step_{step:08d}")
    metadata = reader.read_metadata().state_dict_metadata
    import torch

    state = {key: torch.empty(value.size) for key, value in metadata.items() if isinstance(value, TensorStorageMetadata)}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def assert_same_run(run, reference):
    import torch

    assert losses(run) == losses(reference)
    got, want = tensors(run), tensors(reference)
    assert got.keys() == want.keys() and len(got) > 20
    assert any("exp_avg_sq" in key for key in got)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_deepspeed_and_megatron_are_one_run(workspace, unbroken):
    """The same recipe and weights: 20 steps of ds_train.py."""
    from tests.support.workspace import DEEPSPEED

    run = workspace.path / "deepspeed"
    workspace.entry = DEEPSPEED
    try:
        workspace.train(ranks=1, **{"output.directory": run})
    finally:
        workspace.entry = MEGATRON
    assert losses(unbroken) == pytest.approx(losses(run), abs=1e-5)
    ours, theirs = ([e["gradient_norm"] for e in read_log(r) if "loss" in e] for r in (unbroken, run))
    assert ours == pytest.approx(theirs, rel=1e-4)
    ours, theirs = ([e["validation_loss"] for e in read_log(r) if "validation_loss" in e] for r in (unbroken, run))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert losses(run)[0] - losses(run)[-1] > 0.05


def test_log_status_and_facts(unbroken):
    entries = [entry for entry in read_log(unbroken) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1)) and entries[-1]["tokens"] == STEPS * 4 * 64
    status = json.loads((unbroken / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"], status["starts"]) == ("finished", STEPS, 0, 1)
    checkpoint = unbroken / "checkpoints" / (unbroken / "checkpoints" / "latest").read_text().strip()
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["engine"] == "megatron" and state["step"] == STEPS
    from endprompt.checkpoint.megatron_metadata import read_model_facts

    facts = read_model_facts(checkpoint)
    assert facts.rope.factor == 8 and facts.target_length == 1024 and facts.padded_vocab_size == 512


def test_a_finished_run_ends_at_once_and_another_engine_is_refused(workspace, unbroken):
    assert "finished already" in workspace.train(ranks=1, **{"output.directory": unbroken}).stdout
    from tests.support.workspace import DEEPSPEED

    workspace.entry = DEEPSPEED
    try:
        refused = workspace.train(ranks=1, expect=2, **{"output.directory": unbroken})
    finally:
        workspace.entry = MEGATRON
    assert "was made by the megatron engine" in refused.stderr


def test_resume_after_kill_is_bit_equal(workspace, unbroken):
    run = workspace.path / "killed"
    process = workspace.start(ranks=1, **{"output.directory": run})
    wait_for(lambda: logged_steps(run) >= 13, process)
    kill(process)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    workspace.train(ranks=1, cold=True, **{"output.directory": run})
    assert_same_run(run, unbroken)


def test_resume_at_another_layout(workspace, unbroken, monkeypatch):
    """Saved at TP1 x PP1, asked where it stands, stopped by a signal, resumed at TP2 x PP2."""
    run = workspace.path / "reshaped"
    monkeypatch.setenv("ENDPROMPT_STACKS", str(workspace.path / "stacks"))
    process = workspace.start(ranks=1, **{"output.directory": run, "output.save_interval": 100})
    wait_for(lambda: logged_steps(run) >= 3, process)
    assert_ranks_say_where_they_stand(process, workspace.path / "stacks", ranks=1)
    os.kill(process.pid, signal.SIGUSR1)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 75, (output, error)
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    layout = {"megatron.tensor_parallel": 2, "megatron.pipeline_parallel": 2, "output.save_interval": 100}
    workspace.train(ranks=4, **{"output.directory": run, **layout})
    assert losses(run) == pytest.approx(losses(unbroken), abs=1e-5)


def test_background_saves_are_the_same_checkpoints(workspace, unbroken):
    run = workspace.path / "background"
    workspace.train(ranks=1, **{"output.directory": run, "megatron.async_save": True})
    assert_same_run(run, unbroken)
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000010", "step_00000020"]


def test_a_stop_file_stops_until_it_is_removed(workspace):
    run = workspace.path / "stop"
    process = workspace.start(ranks=1, **{"output.directory": run})
    wait_for(lambda: logged_steps(run) >= 2, process)
    (run / "STOP").touch()
    process.communicate(timeout=120)
    assert process.returncode == 75 and json.loads((run / "status.json").read_text())["state"] == "stopped"
    refused = workspace.train(ranks=1, expect=2, **{"output.directory": run})
    assert "remove the file" in refused.stderr


@pytest.mark.timeout(900)
def test_twenty_kills_during_saves_lose_nothing(workspace, unbroken):
    """Saves after every step, of a run that is long enough never to end; its rate is constant, so its steps are the unbroken run's."""
    run = workspace.path / "torn"
    settings = {"output.directory": run, "output.save_interval": 1, "output.validation_interval": 1000, "training.steps": 500}
    # Tensors are on their way to the disk; before that the writer's helpers take their time to start.
    kill_during_saves(partial(workspace.start, ranks=1, **settings), run / "checkpoints", "step_*.incomplete/*.distcp", kills=20)
    reached = logged_steps(run)
    process = workspace.start(ranks=1, **settings)
    wait_for(lambda: logged_steps(run) >= max(reached, 4) + 2, process)
    kill(process)
    steps = [entry["step"] for entry in read_log(run)]
    assert steps == list(range(1, len(steps) + 1)), "no step lost, none repeated"
    common = min(len(steps), STEPS)
    assert common >= 6 and losses(run)[:common] == losses(unbroken)[:common]


def test_a_damaged_checkpoint_gives_one_line(workspace, unbroken, tmp_path):
    import shutil

    run = tmp_path / "damaged"
    shutil.copytree(unbroken, run)
    (run / "checkpoints" / "latest").write_text("step_00000010\n")
    file = max((run / "checkpoints" / "step_00000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    refused = workspace.train(ranks=1, expect=2, **{"output.directory": run})
    assert refused.stderr.count("error: ") == 1 and "cannot be loaded" in refused.stderr and "Traceback" not in refused.stderr


def test_dry_run_builds_every_stage(workspace):
    run = workspace.path / "dry"
    layout = {"megatron.tensor_parallel": 2, "megatron.pipeline_parallel": 2, "megatron.context_parallel": 2}
    shown = workspace.train("--dry-run", "--world-size", "16", **{"output.directory": run, **layout}).stdout
    assert "TP 2 + SP x PP 2 x CP 2 x DP 2 = 16 ranks" in shown and "stage 1: layers 2-3 + output_layer" in shown
    assert "128 -> 1024 (linear, s = 8)" in shown and not (run / "checkpoints").exists()


@pytest.mark.timeout(300)
def test_dry_run_of_the_mission(tmp_path):
    """recipes/llama3_70b_128k.yaml on 64 ranks: a checkpoint of 70B whose numbers are holes in its files, and the real code."""
    import shutil

    import numpy as np

    from endprompt.data.indexed import write_indexed
    from tests.support.sparse import make_sparse_checkpoint
    from tests.support.tiny import make_tiny_tokenizer

    architecture = make_sparse_checkpoint(tmp_path / "Meta-Llama-3-70B")
    make_tiny_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "tokenizer" / name, tmp_path / "Meta-Llama-3-70B" / name)
    for name in ("llama3_train", "llama3_validation"):
        write_indexed(tmp_path / name, [np.arange(5, 505).repeat(40)], dtype=np.int32)
    command = [*MEGATRON, "--recipe", "recipes/llama3_70b_128k.yaml", "--dry-run", "--world-size", "64"]
    environment = {**quiet_environment(), "CHECKPOINTS": str(tmp_path), "DATA": str(tmp_path), "RUNS": str(tmp_path / "runs")}
    # The disk that three checkpoints of 988 GB need is not here: that check comes first, and says so.
    refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    if refused.returncode == 2:
        assert "needs 2963.3 GB for 3 more checkpoint(s)" in refused.stderr
        environment["PYTHONPATH"] = str(tmp_path)
        (tmp_path / "sitecustomize.py").write_text(
            "import shutil; shutil.disk_usage = lambda path: type('Usage', (), {'free': 10**13, 'total': 10**13, 'used': 0})()"
        )
        refused = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert refused.returncode == 0, refused.stderr[-2000:]
    shown = refused.stdout
    stages = [line for line in shown.splitlines() if " stage " in f" {line.strip()}" or "stage " in line]
    assert "70.55 B parameters" in shown and "= 64 ranks" in shown
    held = [float(line.split(": ")[2].split(" B")[0]) for line in stages]
    tensor = json.loads(json.dumps(int(shown.split("TP ")[1].split()[0])))
    matrices = architecture.parameters - (2 * architecture.layers + 1) * architecture.hidden_size  # norms are copies
    assert sum(held) * tensor * 1e9 == pytest.approx(matrices, rel=2e-3), "the stages of one tensor-parallel rank make the whole model"


def test_a_users_own_script_with_two_lines(workspace, unbroken):
    """tests/support/own_script.py: upstream's datasets, loader, model and schedule; it prints the losses of three micro-batches."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/support/own_script.py"), str(workspace.recipe_file), str(workspace.path)]
    finished = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads(finished.stdout.strip().splitlines()[-1])
    assert found["losses"] == pytest.approx(found["expected"], abs=1e-4) and len(set(found["losses"])) == 3
    assert max(found["positions"]) == 1023


def test_a_background_save_survives_the_error_that_ends_the_run(workspace):
    run = workspace.path / "late"
    fields = {"output.directory": run, "megatron.async_save": True, "output.save_interval": 2, "output.validation_interval": 100}
    refused = workspace.train(ranks=1, expect=2, **fields, **{"training.learning_rate": 1e30, "training.clip_grad": 0})
    assert refused.stderr.count("error: ") == 1 and "Traceback" not in refused.stderr
    assert "checkpoints/latest names it" in refused.stderr and (run / "checkpoints" / "latest").read_text() == "step_00000002\n"


def test_another_optimizer_is_refused_on_resume(workspace, unbroken):
    refused = workspace.train(ranks=1, expect=2, **{"output.directory": unbroken, "megatron.distributed_optimizer": False})
    assert "was made with megatron.distributed_optimizer: true" in refused.stderr


def test_data_parallel_ranks_share_the_writing(workspace, unbroken):
    run = workspace.path / "shared"
    workspace.train(ranks=2, **{"output.directory": run, "training.steps": 4, "output.save_interval": 2})
    names = {path.name.split("_")[2] for path in (run / "checkpoints" / "step_00000004").glob("__*.distcp")}
    assert names == {"0", "1"} and losses(run) == pytest.approx(losses(unbroken)[:4], abs=1e-5)
