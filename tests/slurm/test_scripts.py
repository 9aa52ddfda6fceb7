"""The scripts as text, as rendered, and as SLURM takes them: held against the recipes and a declared 16 x 8 H100 partition."""

from __future__ import annotations

import os
import re
import shlex
import subprocess

import pytest

from endprompt.planning import Cluster as Nodes
from endprompt.planning import make_plan
from endprompt.recipe import load_recipe
from tests.slurm.test_cluster_env import good, run, written
from tests.support.workspace import ROOT

SCRIPTS = sorted(ROOT.glob("slurm/*.sh"))
EXTEND = sorted(ROOT.glob("slurm/extend_*.sh"))
SUBMITTED = [script for script in SCRIPTS if script.name != "pipeline.sh"]
TABLES = sorted(ROOT.glob("slurm/sweeps/*.txt"))
GOLDEN = ROOT / "tests" / "slurm" / "golden"


def options(script) -> dict[str, str]:
    """The #SBATCH lines that SLURM reads: those before the first command."""
    found = {}
    for line in script.read_text().splitlines():
        if line.startswith("#SBATCH "):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def recipe_and_engine(script) -> tuple[str, str]:
    return re.search(r"^extend (\S+) (\S+)", script.read_text(), re.MULTILINE).groups()


@pytest.mark.parametrize("script", SUBMITTED, ids=lambda script: script.name)
def test_what_slurm_must_know_stands_before_the_first_command(script):
    text, found = script.read_text(), options(script)
    assert text.count("\n#SBATCH ") == len(found), "SLURM ignores #SBATCH lines after the first command"
    assert found["open-mode"] == "append" and "requeue" in found, "a requeued job must not overwrite its log"
    assert "/" not in found["output"], "a log folder that does not exist fails a job without a word"
    if script in EXTEND:
        assert found["signal"] == "B:USR1@600" and found["job-name"] == script.stem


def test_a_save_is_given_up_before_the_time_limit_is_final():
    """Of the 600 s of --signal a minute is left to cancel the step, judge the attempt and requeue."""
    seconds = int(re.search(r"^SAVE_SECONDS=(\d+)$", (ROOT / "slurm/lib/train.sh").read_text(), re.MULTILINE)[1])
    assert 300 <= seconds <= 530


@pytest.mark.parametrize("script", SCRIPTS + sorted(ROOT.glob("slurm/lib/*.sh")), ids=lambda script: script.name)
def test_no_path_no_secret_no_value_of_a_recipe(script):
    code = "\n".join(line for line in script.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"(?<![\w$}])/(home|scratch|mnt|data|work|shared|lustre|fsx)\b", code)
    assert not re.search(r"(?i)(api_key|token|password|secret)\s*=", code)
    assert not re.search(r"learning_rate|batch_size|target_length=|training\.|rope\.|positions\.", code)


@pytest.mark.parametrize("script", EXTEND, ids=lambda script: script.name)
def test_nodes_and_time_hold_against_the_plan(script):
    """What SLURM is asked for is what the planner says the recipe takes, and half as long again."""
    file, engine = recipe_and_engine(script)
    found = options(script)
    plan = make_plan(load_recipe(ROOT / file), engine, Nodes(int(found["nodes"]), int(found["gpus-per-node"])))
    hours, minutes, seconds = map(int, found["time"].split(":"))
    assert plan.fits and hours + minutes / 60 >= 1.5 * plan.hours
    assert script.stem.removeprefix("extend_") in load_recipe(ROOT / file).name


def test_every_length_of_both_sizes_has_a_script():
    names = {script.stem for script in EXTEND}
    assert names == {f"extend_8b_{n}k" for n in (32, 64, 96, 128, 256)} | {f"extend_70b_{n}k" for n in (64, 128, 256)}


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.stem)
def test_sweeps_name_recipes_that_load_and_fit_one_node(table):
    names = []
    for line in table.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, recipe, *fields = line.split()
            names.append(name)
            loaded = load_recipe(ROOT / recipe, [*fields, f"name={table.stem}_{name}"])
            assert make_plan(loaded, "deepspeed", Nodes(1, 8)).fits, line
    assert len(names) == len(set(names)) >= 3


@pytest.mark.parametrize("script", EXTEND, ids=lambda script: script.name)
def test_the_rendered_script_is_the_one_that_was_reviewed(script, tmp_path):
    """On a difference: read it, then write it to tests/slurm/golden/ (`REVIEWED=1 pytest tests/slurm/test_scripts.py`)."""
    settings = {**good(tmp_path), "SBATCH_PARTITION": "h100", "SBATCH_ACCOUNT": "research"}
    rendered = run(tmp_path, f"slurm/{script.name}", "--render", text=written(settings))
    assert rendered.returncode == 0, rendered.stderr
    text = rendered.stdout.replace(str(tmp_path), "/shared").replace(settings["PYTHON"], ".venv/bin/python")
    golden = GOLDEN / f"{script.stem}.txt"
    if os.environ.get("REVIEWED"):
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("script", SUBMITTED, ids=lambda script: script.name)
def test_slurm_accepts_it(script, cluster):
    done = subprocess.run(["sbatch", "--test-only", str(script)], cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    found = options(script)
    processors = int(found["cpus-per-task"]) if "cpus-per-task" in found else 96 * int(found["nodes"])  # else whole nodes
    assert f"using {processors} processors" in done.stderr


def test_more_nodes_than_there_are_is_refused_before_the_queue(cluster):
    command = ["sbatch", "--test-only", "--nodes=17", "slurm/extend_70b_128k.sh"]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode != 0


def test_the_path_to_a_submitted_job_is_five_commands(cluster):
    """README's quick start, from a clone to a 70B job: its commands are counted here and run in tests/slurm/test_jobs.py."""
    section = (ROOT / "README.md").read_text().split("## On a cluster", 1)[1].split("```bash", 1)[1].split("```", 1)[0]
    commands = [line for line in section.splitlines() if line.strip() and not line.startswith("#")]
    assert len(commands) <= 5 and shlex.split(commands[-1], comments=True) == ["sbatch", "slurm/extend_70b_128k.sh"]
