"""cluster.env: whatever is wrong in it costs the user one line that names file, field and fix."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.workspace import ROOT

SCRIPTS = ["slurm/extend_70b_128k.sh", "slurm/pipeline.sh", "slurm/evaluate.sh"]


def run(path, *command, text: str | None = None, **variables) -> subprocess.CompletedProcess:
    """A script with a cluster.env of `text`; none where it is None."""
    file = path / "cluster.env"
    if text is not None:
        file.write_text(text)
    environment = {**os.environ, "CLUSTER_ENV": str(file), **variables}
    return subprocess.run(["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


def good(path) -> dict[str, str]:
    for name in ("checkpoints", "data", "runs"):
        (path / name).mkdir(exist_ok=True)
    folders = {"CHECKPOINTS": "checkpoints", "DATA": "data", "RUNS": "runs"}
    return {**{name: str(path / folder) for name, folder in folders.items()}, "PYTHON": sys.executable}


def written(settings: dict[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in settings.items())


def one_line(finished: subprocess.CompletedProcess) -> str:
    assert finished.returncode == 2, (finished.stdout, finished.stderr)
    lines = finished.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), finished.stderr
    return lines[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_it_one_line_says_what_to_do(tmp_path, script):
    assert "cp slurm/cluster.env.example" in one_line(run(tmp_path, script))


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("CHECKPOINTS", "", "CHECKPOINTS: is empty; name a folder"),
        ("DATA", "data", "DATA: data is no absolute path"),
        ("RUNS", "/no/such/folder", "RUNS: no folder /no/such/folder; mkdir -p it"),
        ("PYTHON", "/no/python", "PYTHON: /no/python cannot be run; run make setup"),
        ("CONTAINER_MOUNTS", "/a:/b", "CONTAINER_IMAGE is not; name the image"),
        ("CONTAINER_IMAGE", "/no/image.sqsh", "CONTAINER_IMAGE: no file /no/image.sqsh"),
        ("WANDB_MODE", "on", "WANDB_MODE: on is none of disabled offline online"),
        ("EVALUATE", "maybe", "EVALUATE: maybe is none of yes no"),
        ("DEVICE", "tpu", "DEVICE: tpu is none of cuda cpu"),
        ("HANG_TIMEOUT", "1h", "HANG_TIMEOUT: 1h is no positive whole number"),
        ("MAX_IDLE", "0", "MAX_IDLE: 0 is no positive whole number"),
        ("MAX_RESTARTS", "many", "MAX_RESTARTS: many is no positive"),
        ("PROCESSES_PER_NODE", "eight", "PROCESSES_PER_NODE: eight is no positive whole number; leave it empty"),
        ("HANG_TIMOUT", "600", "HANG_TIMOUT: unknown setting; did you mean HANG_TIMEOUT?"),
        ("GPU", "a100", "GPU: a100 is none of h100-80gb h200-141gb"),
        ("MIN_ALL_REDUCE_GBPS", "fast", "MIN_ALL_REDUCE_GBPS: fast is no number"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, setting, value, said):
    text = written({**good(tmp_path), setting: value})
    line = one_line(run(tmp_path, "slurm/extend_70b_128k.sh", "--render", text=text))
    assert said in line and str(tmp_path / "cluster.env") in line


def test_a_folder_that_cannot_be_written(tmp_path):
    settings = good(tmp_path)
    settings["RUNS"] = "/proc"
    assert "RUNS: /proc cannot be written" in one_line(run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=written(settings)))


def test_shell_that_does_not_parse(tmp_path):
    text = written(good(tmp_path)) + 'CORPUS="never closed\n'
    assert "not valid shell" in one_line(run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text))


def test_settings_of_others_and_shell_of_ones_own_pass(tmp_path):
    """Also what fails in passing: `module load` and tests are not written for `set -e`."""
    text = (
        written(good(tmp_path)) + "export NCCL_SOCKET_IFNAME=bond0 https_proxy=http://proxy\nBASE=/fsx\nfalse\n[[ -d /no ]] && export X=1\n"
    )
    assert run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text).returncode == 0


def test_empty_account_and_partition_are_not_passed_on(cluster, tmp_path):
    """sbatch takes an empty SBATCH_PARTITION for the name of a partition."""
    text = written({**good(tmp_path), "DEVICE": "cpu", "PROCESSES_PER_NODE": "1"}) + "export SBATCH_PARTITION= SBATCH_ACCOUNT=\n"
    environment = {"SLURM_CONF": cluster.environment["SLURM_CONF"], "SBATCH_PARTITION": "", "SBATCH_OUTPUT": f"{tmp_path}/log"}
    found = run(tmp_path, "slurm/extend_8b_64k.sh", "--hold", text=text, **environment)
    assert found.returncode == 0 and "submitted job" in found.stdout, found.stderr
    cluster.output("scancel", found.stdout.split()[-1])


def test_a_refused_submission_is_no_submission(cluster, tmp_path):
    text = written(good(tmp_path))
    found = run(tmp_path, "slurm/extend_8b_64k.sh", "--nodes=99", text=text, SLURM_CONF=cluster.environment["SLURM_CONF"])
    assert found.returncode == 2 and "submitted" not in found.stdout and "error: sbatch refused" in found.stderr


def test_looking_at_a_job_from_within_an_allocation_starts_nothing(tmp_path):
    text = written(good(tmp_path))
    found = run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text, SLURM_JOB_ID="7", SLURM_TASK_PID="1")
    assert found.returncode == 0 and not list((tmp_path / "runs").iterdir())


def test_an_engine_that_is_none(tmp_path):
    text = written(good(tmp_path))
    assert "ENGINE: jax is neither" in one_line(run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text, ENGINE="jax"))


def test_an_override_that_is_wrong_is_the_recipes_own_error(tmp_path):
    text = written(good(tmp_path))
    found = run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text, OVERRIDES="rope.kind=yarn")
    assert "recipes/llama3_8b_64k.yaml: rope.kind: unknown field" in one_line(found)


def test_an_override_with_brackets_is_no_pattern_of_file_names(tmp_path):
    (ROOT / "seed=1").touch()
    try:
        text = written(good(tmp_path))
        found = run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text, OVERRIDES="seed=[1] positions.prompts=[EP_2,EP_3]")
    finally:
        (ROOT / "seed=1").unlink()
    assert "recipes/llama3_8b_64k.yaml: seed: " in one_line(found)


def test_a_script_outside_the_repository_says_where_to_go(tmp_path):
    script = ROOT / "slurm" / "extend_8b_64k.sh"
    found = subprocess.run(["bash", str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2 and "is not the root of the repository" in found.stderr


def test_a_partition_that_the_cluster_does_not_have(cluster, tmp_path):
    text = written({**good(tmp_path), "SBATCH_PARTITION": "h200"})
    found = run(tmp_path, "slurm/extend_8b_64k.sh", text=text, SLURM_CONF=cluster.environment["SLURM_CONF"])
    assert "this cluster has no partition h200; sinfo -s lists them" in one_line(found)


def test_a_container_on_a_cluster_without_pyxis(cluster, tmp_path):
    image = tmp_path / "image.sqsh"
    image.touch()
    text = written({**good(tmp_path), "CONTAINER_IMAGE": str(image)})
    found = run(tmp_path, "slurm/extend_8b_64k.sh", "--render", text=text, SLURM_CONF=cluster.environment["SLURM_CONF"])
    assert "no --container-image (pyxis); empty it and set PYTHON" in one_line(found)
