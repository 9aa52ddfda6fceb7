"""What takes too long for every commit: `make soak`. Its last results are in benchmarks/results/soak.json."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from benchmarks.machine import describe_machine
from tests.slurm.cluster import NODES
from tests.slurm.site import kill, signal_batch
from tests.slurm.victim import Victim, history_without_slurm
from tests.support.workspace import ROOT

pytestmark = pytest.mark.skipif(not os.environ.get("SOAK"), reason="takes twenty minutes; run it with make soak")
STEPS = 300
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"


def record(**facts) -> None:
    """Add to the committed results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**found, **facts, "machine": describe_machine()}, indent=2) + "\n")


def test_twenty_random_kills_over_one_run(prepared):
    """Kinds and moments are drawn; no step is lost beyond the last checkpoint, none is repeated, the losses are the unbroken run's.

    One in three comes while an attempt starts and loads, the others after 1 to 12 steps of it.
    """
    prepared.write_settings(MAX_IDLE="20")  # a kill may come before the first save of an attempt, and often
    draw = random.Random(20)
    victim = Victim(prepared, "twenty", steps=STEPS)
    cluster, kills = victim.cluster, []
    for number in range(20):
        if draw.random() < 1 / 3:
            victim.training()
            time.sleep(draw.uniform(0, 8))
        else:
            victim.go_on(draw.randint(1, 12))
            time.sleep(draw.uniform(0, 0.3))  # within a step, or within a save
        assert not victim.ended, f"finished after {number} kills; draw shorter pauses"
        kind, before = draw.choice(["rank", "rank", "node", "requeue", "signal"]), victim.run.step
        kills.append({"kind": kind, "at_step": before})
        hurt(victim, kind, draw.choice(victim.nodes))
        victim.restarted(number + 1)
        kept = victim.starts[-1]["step"]
        assert before - kept <= victim.save_interval, f"{kind}: step {before} was logged, the checkpoint is of {kept}"
        for node in map(cluster.node, range(1, NODES + 1)):
            if not cluster.is_on(node):
                cluster.power_on(node)
    prepared.wait_for(victim.job, "COMPLETED")
    history = victim.run.history
    assert history == history_without_slurm(prepared, f"training.steps={STEPS} output.save_interval=1000")
    restarts = int(cluster.job(victim.job)["Restarts"])
    record(twenty_kills={"kills": kills, "restarts": restarts, "steps": len(history), "history": "bit-equal"})


def hurt(victim: Victim, kind: str, node: str) -> None:
    if kind == "rank":
        kill(victim.rank_on(node))
    elif kind == "node":
        victim.cluster.power_off(node)
    elif kind == "requeue":
        victim.cluster.output("scontrol", "requeue", victim.job)
    else:
        signal_batch(victim.cluster, victim.job)


def test_the_time_limit_itself(prepared, unbroken):
    """--time=1 with the signal 20 s before the end, as SLURM sends it: the job comes back by itself until it is done."""
    victim = Victim(prepared, "limited", "--time=1", "--signal=B:USR1@20")
    prepared.wait_for(victim.job, "COMPLETED")
    restarts = int(victim.cluster.job(victim.job)["Restarts"])
    assert restarts >= 1 and victim.run.history == unbroken
    assert all("time limit" in reason or "finished" in reason for reason in victim.run.reasons)
    record(time_limit={"restarts": restarts, "history": "bit-equal"})


def test_a_rank_that_hangs_is_found_and_the_run_goes_on(prepared, unbroken):
    prepared.write_settings(HANG_TIMEOUT="45")
    victim = Victim(prepared, "hanging")
    victim.go_on(2)
    began = time.monotonic()
    bad = victim.nodes[1]
    for process in victim.rank_on(bad):
        os.kill(process, signal.SIGSTOP)
    victim.restarted(1)
    found = time.monotonic() - began
    prepared.wait_for(victim.job, "COMPLETED")
    assert victim.run.history == unbroken and victim.run.reasons[0].startswith("hung: nothing written")
    log, hung = prepared.log(victim.job), victim.run.attempts[1]
    assert f"{bad}: rank 1 does not answer" in log and ": rank 0\n" in log, "who stands where"
    assert hung["suspects"] == [bad] and f"rank 1 on {bad} did not answer" in hung["reason"]
    record(hang={"timeout_s": 45, "restarted_after_s": round(found, 1), "history": "bit-equal"})


def test_a_job_that_gets_nowhere_is_given_up(prepared):
    """A rank that dies at every start before a checkpoint: three attempts, then no more GPU-hours."""
    prepared.write_settings(MAX_IDLE="3")
    victim = Victim(prepared, "nowhere", save_interval=1000)
    for attempt in range(3):
        victim.go_on(2)
        kill(victim.rank_on(victim.nodes[attempt % 2]))
        if attempt < 2:
            victim.restarted(attempt + 1)
    prepared.wait_for(victim.job, "FAILED")
    assert "3 attempts in a row brought no new checkpoint" in prepared.log(victim.job)
    assert int(victim.cluster.job(victim.job)["Restarts"]) == 2
