"""Jobs on a real SLURM with the real training code: the whole way, and what can happen to a job on it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.slurm.site import Site, kill, signal_batch
from tests.slurm.victim import RUN_8B, Victim
from tests.support.workspace import ROOT

pytestmark = pytest.mark.timeout(1200)
MEGATRON = (
    "training.steps=6 output.save_interval=3 megatron.tensor_parallel=1 megatron.pipeline_parallel=2 megatron.virtual_pipeline=1 "
    "megatron.context_parallel=1"
)


def test_one_run_survives_everything(prepared, unbroken):
    """One run through a time limit's signal, a user's requeue, deaths of ranks, of a node and of a slurmd: one history, bit by bit."""
    victim = Victim(prepared, "survivor")
    cluster, job = victim.cluster, victim.job

    victim.go_on(3)
    signal_batch(cluster, job)
    victim.restarted(1)

    victim.go_on(3)
    cluster.output("scontrol", "requeue", job)
    victim.restarted(2)

    bad = victim.nodes[1]
    victim.go_on(1)
    rank = victim.rank_on(bad)
    victim.while_saving()
    kill(rank)
    victim.restarted(3)

    assert bad in victim.nodes
    victim.go_on(3)
    kill(victim.rank_on(bad))
    victim.restarted(4)
    assert bad not in victim.nodes and bad in cluster.job(job)["ExcNodeList"], "it was the first to fail, twice"

    victim.go_on(3)
    batch_host = cluster.job(job)["BatchHost"]
    cluster.power_off(batch_host)
    victim.restarted(5)
    assert batch_host not in victim.nodes

    victim.go_on(3)
    other = next(node for node in victim.nodes if node != cluster.job(job)["BatchHost"])
    orphans = victim.rank_on(other)
    for process in orphans:  # so that the run is not done before SlurmdTimeout, 10 s, is over
        os.kill(process, signal.SIGSTOP)
    os.kill(int((cluster.path / f"{other}.pid").read_text()), signal.SIGKILL)  # slurmd alone, not what it has started
    victim.restarted(6)
    kill(orphans)

    prepared.wait_for(job, "COMPLETED")
    assert victim.run.history == unbroken, "no step lost, none repeated, the same losses"
    reasons = victim.run.reasons
    assert "time limit or preemption" in reasons[0] and f"on {bad} ended first, with exit code 137" in " ".join(reasons)

    cluster.output("scontrol", "requeue", job)  # SLURM may start a finished job again
    cluster.wait(lambda: "finished already at step 60" in prepared.log(job), "the finished job ended at once")
    prepared.wait_for(job, "COMPLETED")
    assert victim.run.history == unbroken


def test_a_preempted_job_comes_back_and_a_cancelled_one_does_not(prepared, unbroken):
    victim = Victim(prepared, "preempted", "--nodelist=node15,node16")
    cluster, job = victim.cluster, victim.job
    victim.go_on(3)
    urgent = cluster.output(
        "sbatch", "--parsable", "--partition=urgent", "--nodelist=node15,node16", "--nodes=2", "--exclusive", "--output=/dev/null",
        "--wrap", "sleep 1",
    )  # fmt: skip
    prepared.wait_for(urgent, "COMPLETED")
    victim.restarted(1)
    victim.go_on(3)
    cluster.output("scancel", job)
    prepared.wait_for(job, "CANCELLED")
    time.sleep(3)
    assert cluster.job(job)["JobState"] == "CANCELLED"
    history = victim.run.history
    assert len(history) >= 7 and history == unbroken[: len(history)]


@pytest.mark.parametrize(("script", "model", "fields"), [
    ("slurm/extend_70b_128k.sh", "Meta-Llama-3-70B", MEGATRON),
    ("slurm/extend_8b_64k.sh", "Meta-Llama-3-8B", "training.steps=6 output.save_interval=3"),
], ids=["70B on Megatron", "8B on DeepSpeed"])  # fmt: skip
def test_the_whole_way(prepared, script, model, fields):
    """bash slurm/pipeline.sh: a Megatron checkpoint and text in; a trained, exported, evaluated model out."""
    site, before = prepared, dict(prepared.settings)
    place = site.path / f"pipeline_{model}"
    for name in ("checkpoints", "data"):
        (place / name).mkdir(parents=True)
    convert = [sys.executable, "tools/hf_to_megatron.py", "--input", site.make_model(), "--output", place / "source"]
    subprocess.run(convert, cwd=ROOT, check=True, capture_output=True)
    folders = {"CHECKPOINTS": place / "checkpoints", "DATA": place / "data", "SOURCE_CHECKPOINT": place / "source"}
    site.write_settings(**folders, EVALUATION_OPTIONS="--cases 2 --distances 512 --dtype fp32")
    run = site.run(f"pipeline_{model}")
    started = site.bash(
        "slurm/pipeline.sh", script, "--nodes=2", overrides=f"{fields} output.directory={run.path}",
        SBATCH_OUTPUT=f"{site.path}/logs/%x-%j.log",
    )  # fmt: skip
    assert started.returncode == 0, started.stderr
    jobs = dict(line.split(" job ") for line in started.stdout.splitlines() if " job " in line)
    jobs = {name.strip(): number.strip() for name, number in jobs.items()}
    assert list(jobs) == ["convert", "prepare", "train", "evaluate"]
    for number in jobs.values():
        site.wait_for(number, "COMPLETED")
    site.write_settings(**{"SOURCE_CHECKPOINT": "", "EVALUATION_OPTIONS": "", **before})
    assert run.reasons == ["finished at step 6"], site.log(jobs["train"])
    assert not list(run.path.glob("attempts/*/stacks")), "nobody asked for them"
    assert (place / "checkpoints" / model / "model.safetensors").exists() and len(run.history) == 6
    config = json.loads((run.path / "export" / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    report = json.loads((run.path / "evaluation" / "report.json").read_text())
    assert {"base", "extended"} <= set(json.dumps(report).replace('"', " ").split())


def test_the_tasks_of_a_sweep_do_not_touch_each_other(prepared):
    """SLURM_JOB_ID of an array's last task is the array's own: what is done in its name must not reach the others."""
    site, cluster = prepared, prepared.cluster
    table = site.path / "pair.txt"
    line = "recipes/llama3_8b_64k.yaml training.steps=40 output.save_interval=10"
    table.write_text(f"# two runs\nfirst {line} seed=1\n\nlast {line} seed=2\n")
    started = site.bash("slurm/sweep.sh", str(table), SBATCH_OUTPUT=f"{site.path}/logs/%x-%A_%a.log")
    assert started.returncode == 0 and "2 runs" in started.stdout, started.stderr
    array = started.stdout.split("submitted job ")[1].split(":")[0]
    first, last = site.run("sweep_pair/first"), site.run("sweep_pair/last")
    cluster.wait(lambda: first.step >= 2 and last.step >= 2, "both runs train")
    signal_batch(cluster, f"{array}_1")
    for task in (f"{array}_0", f"{array}_1"):
        site.wait_for(task, "COMPLETED")
    assert [len(run.history) for run in (first, last)] == [40, 40]
    assert first.reasons == ["finished at step 40"], "one start, undisturbed"
    assert len(last.reasons) == 2 and "time limit" in last.reasons[0]


def test_a_stopped_run_is_not_evaluated_and_goes_on_later(prepared):
    """A file STOP ends the job with a code that keeps what waits for a finished run (afterok) from starting."""
    victim = Victim(prepared, "stopped")
    victim.go_on(2)
    (victim.run.path / "STOP").touch()
    prepared.wait_for(victim.job, "FAILED")
    assert "stopped: " in prepared.log(victim.job) and victim.run.state == "stopped"
    evaluation = prepared.submit(
        "slurm/evaluate.sh", "recipes/llama3_8b_64k.yaml", overrides=f"{RUN_8B} output.directory={victim.run.path}"
    )
    prepared.wait_for(evaluation, "FAILED")
    assert f"{victim.run.path}: not finished, it is at step " in prepared.log(evaluation)
    assert not (victim.run.path / "export").exists()


def test_what_no_restart_mends_ends_in_one_line(prepared):
    site = prepared
    overrides = f"{RUN_8B} output.directory={site.path}/runs/bad data.train.0.path={site.path}/data/absent"
    job = site.submit("slurm/extend_8b_64k.sh", "--nodes=2", overrides=overrides)
    site.wait_for(job, "FAILED")
    log = site.log(job)
    assert log.count("error: ") == 1 and f"{site.path}/data/absent" in log and "given up: bad input" in log
    assert "Traceback" not in log and cluster_restarts(site, job) == 0


def cluster_restarts(site: Site, job: str) -> int:
    return int(site.cluster.job(job)["Restarts"])
