"""tools/cluster_job.py as slurm/lib calls it: what it prints for the shell, what for the log, and which stacks it keeps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from endprompt.cluster.attempts import read_attempts, stacks_folder
from tests.support.workspace import ROOT

DUMP = 'Current thread 0x1 (most recent call first):\n  File "/x/site-packages/torch/c10d.py", line 9 in all_gather\n'


@pytest.fixture
def command(tmp_path):
    def command(name: str, restart: int, *options: str, job: str = "7") -> subprocess.CompletedProcess:
        arguments = [
            "--recipe",
            "recipes/llama3_8b_64k.yaml",
            "--set",
            f"output.directory={tmp_path}",
            "--job",
            job,
            "--restart",
            str(restart),
        ]
        environment = {**os.environ, "CHECKPOINTS": "/c", "DATA": "/d", "RUNS": "/r"}
        done = subprocess.run(
            [sys.executable, "tools/cluster_job.py", name, *arguments, *options], cwd=ROOT, env=environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done

    return command


def stacks(run, restart: int, *texts: str, job: str = "7"):
    folder = stacks_folder(run, job, restart)
    folder.mkdir(parents=True)
    for rank, text in enumerate(texts):
        (folder / f"rank-{rank}-node{rank + 1:02d}.txt").write_text(text)
    return folder


def test_the_log_says_where_ranks_stood_and_the_shell_reads_the_verdict(command, tmp_path):
    command("begin", 0, "--nodes", "node01,node02")
    folder = stacks(tmp_path, 0, DUMP, "")
    found = command("end", 0, "--exit-code", "137", "--ranks", "3", "--trained", "--hung", "nothing written")
    assert found.stderr.splitlines() == [
        f"where ranks stood, whole stacks in {folder}:",
        "node02: rank 1 does not answer",
        "all_gather (torch/c10d.py:9): rank 0",
        "1 of 3 ranks left no file: they had not begun to listen",
    ]
    assert found.stdout.splitlines()[:2] == ["ACTION=requeue", "REASON='hung: nothing written; rank 1 on node02 did not answer'"]
    assert read_attempts(tmp_path)[0].end["suspects"] == ["node02"] and folder.exists()


def test_ranks_asked_because_a_save_took_too_long_are_summed_up_and_no_node_is_suspected(command, tmp_path):
    command("begin", 0, "--nodes", "node01,node02")
    stacks(tmp_path, 0, DUMP, "")
    found = command("end", 0, "--exit-code", "137", "--ranks", "2", "--trained", "--asked")
    assert "node02: rank 1 does not answer" in found.stderr
    end = read_attempts(tmp_path)[0].end
    assert end["suspects"] == [] and end["reason"].endswith("and no rank said why (nodes node01, node02); rank 1 on node02 did not answer")


def test_stacks_of_attempts_that_did_not_hang_are_removed_and_another_jobs_left(command, tmp_path):
    command("begin", 0, "--nodes", "node01")
    ended_with_its_shell, others = stacks(tmp_path, 0, ""), stacks(tmp_path, 0, "", job="77")
    command("begin", 1, "--nodes", "node01")
    assert not ended_with_its_shell.exists() and others.exists()
    mine = stacks(tmp_path, 1, "")
    found = command("end", 1, "--exit-code", "1", "--ranks", "1", "--trained")
    assert not mine.exists() and others.exists() and not found.stderr
