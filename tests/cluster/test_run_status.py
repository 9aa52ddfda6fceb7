"""tools/run_status.py from the outside: one run, several, JSON, watching, refusals, and how fast it answers."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from endprompt.cluster.status_text import amount, duration, table
from tests.support.run_folders import Folder
from tests.support.workspace import ROOT

TOOL = [sys.executable, str(ROOT / "tools" / "run_status.py")]


@pytest.fixture
def run(tmp_path) -> Folder:
    return Folder(tmp_path / "run")


def tool(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([*TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_command_shows_one_several_and_json(run, tmp_path):
    run.steps(20)
    run.save(20)
    other = Folder(tmp_path / "other")
    other.steps(3)
    one, many, as_json = tool(run.path), tool(run.path, other.path), tool(run.path, "--json")
    assert one.returncode == 0 and "step 20 of 100 (20.0%), 20 k tokens" in one.stdout
    assert len(many.stdout.splitlines()) == 3 and str(other.path) in many.stdout  # the same recipe twice: folders
    facts = json.loads(as_json.stdout)
    assert (facts["step"], facts["checkpoint_bytes"], facts["mfu"]) == (20, 5002, 0.4)
    listed = json.loads(tool(run.path, other.path, tmp_path / "absent", "--json").stdout)
    assert [entry.get("step") for entry in listed] == [20, 3, None] and "is no folder" in listed[2]["error"]


def test_command_refuses_what_is_no_run_in_one_line(run, tmp_path):
    run.steps(2)
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "absent", run.path / "log.jsonl"):
        refused = tool(folder)
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1) and str(folder) in refused.stderr
    mixed = tool(tmp_path / "empty", run.path)
    assert mixed.returncode == 2 and "tiny" in mixed.stdout and mixed.stderr.count("\n") == 1
    assert tool(run.path, "--watch", "0").returncode == 2


def test_command_watches_until_it_is_interrupted(run):
    run.steps(2)
    command = [*TOOL, str(run.path), "--json", "--watch", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first, second = (json.loads(process.stdout.readline()) for _ in range(2))
    process.send_signal(2)
    _, errors = process.communicate(timeout=30)
    assert first["step"] == second["step"] == 2 and (process.returncode, errors) == (0, "")


def test_a_login_node_answers_at_once(run):
    """A long log and a checkpoint of many files; and nothing heavy is imported."""
    run.steps(20_000)
    path = run.path / "checkpoints" / "step_00000010"
    path.mkdir(parents=True)
    for rank in range(600):
        (path / f"rank_{rank}").touch()
    (path / "state.json").write_text("{}")
    (run.path / "checkpoints" / "latest").write_text(path.name)
    began = time.process_time()  # the processor's own seconds: other work on this machine does not count
    found = run.read()
    assert time.process_time() - began < 1 and found.step == 20_000 and found.checkpoint_step == 10
    code = "import sys; import endprompt.cluster.status_text; sys.exit({'torch', 'numpy', 'pydantic'} & set(sys.modules) != set())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_table_and_units():
    assert [duration(s) for s in (-1, 59, 3599, 7260, 200_000)] == ["0 s", "59 s", "59 min", "2 h 1 min", "2 d 7 h"]
    assert [amount(n) for n in (12, 1.07e9, 30_000)] == ["12 ", "1.07 G", "30 k"]
    assert table([]).startswith("run")
