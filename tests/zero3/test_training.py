"""ds_train.py from the outside: against a plain torch loop, and under interruption, with 2 ranks over gloo."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from endprompt.cluster.status import read as read_run_status
from endprompt.data.indexed import open_indexed, write_indexed
from endprompt.data.samples import SampleDataset
from endprompt.data.tokenizers import load_tokenizer
from endprompt.positions import SampleBuilder, tokenize_prompts
from endprompt.training import hardware
from tests.support.runs import assert_ranks_say_where_they_stand, kill, kill_during_saves, logged_steps, wait_for
from tests.support.workspace import Workspace, losses, read_log

STEPS = 20


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="module")
def unbroken(workspace):
    """The run that every other is held against: 20 steps, 2 ranks, never interrupted, started as a user starts it."""
    run = workspace.path / "unbroken"
    workspace.train(cold=True, **{"output.directory": run})
    return run


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def assert_same_run(run, reference) -> None:
    assert losses(run) == losses(reference)
    got, want = weights(run), weights(reference)
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def samples_of(workspace, sources="train"):
    recipe = workspace.recipe()
    builder = SampleBuilder(
        recipe.positions, recipe.target_length, tokenize_prompts(recipe.positions, load_tokenizer(recipe.model.path)), recipe.seed
    )
    return recipe, SampleDataset(getattr(recipe.data, sources), builder, recipe.seed)


class PlainModel:
    """The reference: transformers' model under eager attention with an explicit physical-causal mask, one sample at a time."""

    def __init__(self, workspace, unbroken):
        config = json.loads((unbroken / "export" / "config.json").read_text())
        self.model = AutoModelForCausalLM.from_pretrained(
            workspace.model, attn_implementation="eager", dtype=torch.float32, rope_parameters=config["rope_parameters"]
        )

    def weighted_loss(self, sample) -> torch.Tensor:
        n = len(sample.tokens)
        tokens, positions = torch.from_numpy(sample.tokens)[None], torch.from_numpy(sample.position_ids)[None]
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        logits = self.model(input_ids=tokens, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
        per_token = F.cross_entropy(logits[:-1], tokens[0, 1:], reduction="none")
        return (per_token * torch.from_numpy(sample.loss_weights)[1:]).sum()


def test_two_ranks_equal_a_plain_torch_loop(workspace, unbroken):
    recipe, data = samples_of(workspace)
    plain = PlainModel(workspace, unbroken)
    optimizer = torch.optim.AdamW(plain.model.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    plain_losses = []
    for step in range(STEPS):
        batch = [data[step * 4 + i] for i in range(4)]
        loss = sum(plain.weighted_loss(s) for s in batch) / sum(float(s.loss_weights.sum()) for s in batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, step / 2)
        optimizer.step()
        plain_losses.append(loss.item())
    assert losses(unbroken) == pytest.approx(plain_losses, abs=1e-6)
    assert plain_losses[0] - plain_losses[-1] > 0.05, "the run must learn something, or equality proves little"


def test_validation_loss_is_the_weighted_mean_over_the_samples(workspace, unbroken):
    recipe, data = samples_of(workspace, "validation")
    exported = PlainModel(workspace, unbroken)
    exported.model.load_state_dict(load_file(unbroken / "export" / "model.safetensors"), strict=False)
    samples = [data[i] for i in range(recipe.data.validation_samples)]  # 6 samples: the last round of 4 is half empty
    with torch.no_grad():
        expected = sum(exported.weighted_loss(s) for s in samples) / sum(float(s.loss_weights.sum()) for s in samples)
    found = {entry["step"]: entry["validation_loss"] for entry in read_log(unbroken) if "validation_loss" in entry}
    assert found.keys() == {10, 20}
    assert found[20] == pytest.approx(expected.item(), abs=1e-5)


def test_log_and_status(unbroken):
    entries = [entry for entry in read_log(unbroken) if "loss" in entry]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    assert entries[-1]["tokens"] == STEPS * 4 * 64 and entries[-1]["tokens_per_second"] > 0 and entries[-1]["mfu"] is None
    status = json.loads((unbroken / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"], status["starts"]) == ("finished", STEPS, 0, 1)


def test_run_status_reads_the_folder(workspace, unbroken):
    found = read_run_status(unbroken)
    assert (found.recipe, found.state, found.step, found.percent, found.starts) == ("tiny", "finished", STEPS, 100.0, 1)
    assert (found.tokens, found.loss) == (STEPS * 4 * 64, losses(unbroken)[-1]) and found.validation_step == STEPS
    assert found.checkpoint_step == STEPS and found.checkpoint_bytes > 100_000
    assert found.overhead_seconds_per_step > 0 and (found.lost_hours, found.error) == (0, None)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_bf16_where_it_is_slow_is_said_once(workspace, precision):
    finished = workspace.train(**{"output.directory": workspace.path / precision, "training.precision": precision, "training.steps": 2})
    expected = hardware.note_on(precision)
    assert finished.stdout.count("multiplies no bf16") == (expected is not None) and (expected or "") in finished.stdout


def test_a_finished_run_ends_at_once(workspace, unbroken):
    before = (unbroken / "export" / "model.safetensors").stat().st_mtime_ns
    assert "finished already" in workspace.train(**{"output.directory": unbroken}).stdout
    assert (unbroken / "export" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_after_kill_is_bit_equal(workspace, unbroken):
    run = workspace.path / "killed"
    process = workspace.start(**{"output.directory": run})
    wait_for(lambda: logged_steps(run) >= 13, process)
    kill(process)
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000010"
    assert not (run / "export").exists()
    workspace.train(cold=True, **{"output.directory": run})
    assert_same_run(run, unbroken)
    assert json.loads((run / "status.json").read_text())["starts"] == 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_saves_and_exits_75(workspace, unbroken, number, monkeypatch):
    run = workspace.path / f"signal{int(number)}"
    monkeypatch.setenv("ENDPROMPT_STACKS", str(workspace.path / f"stacks{int(number)}"))
    process = workspace.start(**{"output.directory": run})
    wait_for(lambda: logged_steps(run) >= 3, process)
    assert_ranks_say_where_they_stand(process, workspace.path / f"stacks{int(number)}", ranks=2)
    os.kill(process.pid, number)
    output, error = process.communicate(timeout=120)
    assert process.returncode == 75, (output, error)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "interrupted" and status["exit_code"] == 75 and 3 <= status["step"] < STEPS
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"
    workspace.train(**{"output.directory": run})
    assert_same_run(run, unbroken)


def test_stop_file_stops_until_it_is_removed(workspace):
    run = workspace.path / "stop"
    process = workspace.start(**{"output.directory": run})
    wait_for(lambda: logged_steps(run) >= 2, process)
    (run / "STOP").touch()
    process.communicate(timeout=120)
    assert process.returncode == 75 and json.loads((run / "status.json").read_text())["state"] == "stopped"
    refused = workspace.train(expect=2, **{"output.directory": run})
    assert "STOP" in refused.stderr and "remove the file" in refused.stderr


def test_other_number_of_ranks_goes_on_through_a_universal_checkpoint(workspace, unbroken):
    run = workspace.path / "reshaped"
    process = workspace.start(**{"output.directory": run})
    wait_for(lambda: (run / "checkpoints" / "latest").exists(), process)
    kill(process)
    workspace.train(ranks=1, **{"output.directory": run})
    assert losses(run)[:11] == pytest.approx(losses(unbroken)[:11], abs=1e-6), "the first loss after the change is the same"
    assert losses(run) == pytest.approx(losses(unbroken), abs=1e-3)
    assert not list((run / "checkpoints").glob("*.universal*")), "the converted copy goes away with the next save"


@pytest.mark.timeout(1200)
def test_twenty_kills_during_saves_lose_nothing(workspace, unbroken):
    """Saves after every step; each start is killed at a random moment of its first save and the next one goes on."""
    run = workspace.path / "torn"
    settings = {"output.directory": run, "output.save_interval": 1}
    checkpoints = run / "checkpoints"
    kill_during_saves(partial(workspace.start, **settings), checkpoints, "step_*.incomplete", kills=20)
    workspace.train(**settings)
    assert [entry["step"] for entry in read_log(run) if "loss" in entry] == list(range(1, STEPS + 1)), "no step lost, none repeated"
    assert_same_run(run, unbroken)
    assert len(list(checkpoints.glob("step_*"))) == 2, "keep_last, and nothing torn stays"


def test_recipe_may_not_change_under_a_run(workspace, unbroken):
    refused = workspace.train(expect=2, **{"output.directory": unbroken, "training.learning_rate": 5e-4})
    assert refused.stderr.count("\n") == 1 and "training.learning_rate 0.001 -> 0.0005" in refused.stderr


def test_offloading_gives_the_same_losses(workspace, unbroken):
    for situation in ("zero3_offload_optimizer", "zero3_offload"):
        run = workspace.path / situation
        workspace.train(**{"output.directory": run, "deepspeed.config": f"deepspeed_configs/{situation}.json", "training.steps": 4})
        assert losses(run) == pytest.approx(losses(unbroken)[:4], abs=1e-6)


def test_nan_loss_stops_with_one_line_and_keeps_the_checkpoint(workspace):
    run = workspace.path / "nan"
    refused = workspace.train(
        expect=2, **{"output.directory": run, "training.learning_rate": 1e30, "training.clip_grad": 0, "output.save_interval": 1}
    )
    assert "the loss is nan" in refused.stderr.lower() and "Traceback" not in refused.stderr
    assert (run / "checkpoints" / "latest").exists()


def test_bad_data_that_one_rank_meets_stops_all_with_one_line(workspace):
    """Without a sidecar a token out of range shows only when it is read: here by rank 1, in the second step."""
    recipe, data = samples_of(workspace)
    corpus = open_indexed(workspace.path / "corpus_train")
    stream = corpus.read(0, corpus.num_tokens)
    text = data[5].tokens[:20]
    (at,) = (i for i in range(len(stream) - 20) if (stream[i : i + 20] == text).all())
    stream[at + 3] = 600
    write_indexed(workspace.path / "poisoned", [stream], dtype=np.uint16)
    run = workspace.path / "poisoned_run"
    refused = workspace.train(expect=2, **{"output.directory": run, "data.train.0.path": workspace.path / "poisoned"})
    assert "holds token 600" in refused.stderr and refused.stderr.count("error: ") == 1 and "Traceback" not in refused.stderr
    assert json.loads((run / "status.json").read_text())["exit_code"] == 2


def test_wandb_offline_is_one_run_across_restarts(workspace):
    run = workspace.path / "wandb"
    settings = {"output.directory": run, "wandb.mode": "offline", "training.steps": 4, "output.save_interval": 2}
    process = workspace.start(ranks=1, **settings)
    wait_for(lambda: (run / "checkpoints" / "latest").exists(), process)
    kill(process)
    workspace.train(ranks=1, **settings)
    folders = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len({name.rsplit("-", 1)[1] for name in folders}) == 1, folders
    assert (run / "wandb_id").read_text().strip() == folders[0].rsplit("-", 1)[1]


def test_dry_run_checks_everything_and_writes_no_checkpoint(workspace):
    run = workspace.path / "dry"
    shown = workspace.train("--dry-run", "--world-size", "4", **{"output.directory": run}).stdout
    assert "nothing trained" in shown and "128 -> 1024 (linear, s = 8)" in shown and "4 ranks" in shown
    assert not (run / "checkpoints").exists() and not (run / "export").exists()
