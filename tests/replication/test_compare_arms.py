"""The comparison of arms at tiny size: the same command, engine and evaluation as at full size."""

import json
import subprocess
import sys

import pytest

from tests.support.workspace import ROOT, Workspace, quiet_environment

SENTENCE = "The ship sailed on through the night and nobody on deck could say how far the shore still was. "


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp("arms"))
    (workspace.path / "novel.txt").write_text(SENTENCE * 100)
    return workspace, compare(workspace)


def compare(workspace, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable, "tools/compare_arms.py", "--recipe", str(workspace.recipe_file), "--output", str(workspace.path / "arms"),
        "--schemes", "endprompt_random,short", "--ropes", "yarn", "--nproc-per-node", "1", "--set", "training.steps=2",
        "--set", "target_length=4096",
        "--text", str(workspace.path / "novel.txt"), "--tasks", "distance", "--evaluate=--cases 2 --distances 600 3000 --dtype fp32", *more,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=280)


def test_every_arm_and_baseline_is_trained_and_evaluated(compared):
    workspace, finished = compared
    assert finished.returncode == 0, finished.stdout + finished.stderr
    output = workspace.path / "arms"
    summary = json.loads((output / "summary.json").read_text())
    assert [row["arm"] for row in summary["arms"]] == ["endprompt_random-yarn", "short-yarn"]
    assert all(row["steps"] == 2 and row["median_step_seconds"] > 0 and row["peak_memory_gb"] > 0 for row in summary["arms"])
    assert summary["machine"]["cores"] and "compare_arms.py" in summary["command"]
    assert (output / "evaluation/report.png").stat().st_size > 10_000
    for name in ("base", "untrained-yarn", "endprompt_random-yarn", "short-yarn"):
        assert name in finished.stdout, "one table holds every arm"
    assert "$ python ds_train.py" in finished.stdout, "each arm can be repeated by hand"


def test_arms_differ_in_nothing_but_the_scheme(compared):
    workspace, _ = compared
    recipes = [(workspace.path / "arms" / arm / "recipe.yaml").read_text() for arm in ("endprompt_random-yarn", "short-yarn")]
    different = [(a, b) for a, b in zip(*(text.splitlines() for text in recipes), strict=True) if a != b]
    assert [a.split(":")[0].strip() for a, _ in different] == ["scheme", "directory"]


def test_a_second_start_trains_nothing_again(compared):
    workspace, _ = compared
    again = compare(workspace)
    assert again.returncode == 0 and again.stdout.count("finished already") == 2


def test_text_must_exist(compared):
    refused = compare(compared[0], "--text", "nowhere.txt")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "nowhere.txt" in refused.stderr
