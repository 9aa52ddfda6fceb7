"""From head to judge with real processes over gloo: two nodes of two ranks, and what happens when one of them is broken."""

import json
import subprocess
import sys
import time

import pytest

from endprompt.cluster.preflight import records
from endprompt.cluster.preflight.judge import Wanted, judge
from endprompt.errors import run_command
from tests.support.preflight_ranks import free_port
from tests.support.preflight_records import write_records
from tests.support.workspace import ROOT, Workspace, quiet_environment
from tools import preflight

COMMAND = [sys.executable, str(ROOT / "tools" / "preflight.py")]
SECONDS, ENOUGH = 4, 60
"""Timeouts: of worlds in which somebody is waited for in vain, and of the others, on a machine that may be busy."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("preflight"))


def call(*arguments):
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def good(workspace):
    """(folder of records, head's output, ranks' outputs) of a preflight of two nodes with two ranks each."""
    folder = workspace.path / "run" / "preflight"
    folder.mkdir(parents=True)
    (folder / "node-gone.json").write_text("{}")  # of an earlier preflight
    head = call(
        "head", "--recipe", workspace.recipe_file, "--engine", "deepspeed", "--nodes", 2, "--processes-per-node", 2, "--device", "cpu",
        "--records", folder,
    )  # fmt: skip
    assert head.returncode == 0, head.stderr
    ranks, port = [], free_port()
    for rank in range(4):
        place = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port, "SLURMD_NODENAME": f"node0{1 + rank // 2}"}  # fmt: skip
        environment = {**quiet_environment(), **{name: str(value) for name, value in place.items()}}
        ranks.append(
            subprocess.Popen(
                [*COMMAND, "rank", "--records", str(folder), "--gpus", "0", "--all-reduce-mb", "1"], cwd=ROOT, env=environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    said = [process.communicate(timeout=200) for process in ranks]
    assert [process.returncode for process in ranks] == [0] * 4, said
    return folder, head, said


def test_head_says_what_it_checked_and_removes_old_records(good):
    folder, head, _ = good
    rows = [line.split(None, 2) for line in head.stdout.splitlines()]
    assert [row[0] for row in rows] == ["ok"] * 8
    assert [row[1] for row in rows] == ["recipe", "checkpoint", "tokenizer", "data", "layout", "memory", "run", "records"]
    assert "not checked: the run is on CPUs" in head.stdout and head.stderr == ""
    assert not (folder / "node-gone.json").exists()
    record = json.loads((folder / "head.json").read_text())
    assert len(record["token"]) == 16 and record["engine"] == "deepspeed" and len(record["commit"]) == 40
    assert record["versions"]["torch"] and record["recipe"]["name"] == "tiny"


def test_ranks_measure_and_say_one_line(good):
    folder, _, said = good
    assert [err for _, err in said] == [""] * 4
    assert said[0][0].startswith("all-reduce: ") and [out for out, _ in said[1:]] == [""] * 3
    whole = json.loads((folder / "all_reduce.json").read_text())
    assert whole["world_size"] == 4 and whole["backend"] == "gloo" and whole["bytes"] == 10**6
    assert whole["bus_gb_per_s"] == pytest.approx(whole["algorithm_gb_per_s"] * 1.5) and whole["bus_gb_per_s"] > 0
    node = json.loads((folder / "node-node02.json").read_text())
    assert node["ranks"] == [2, 3] and node["token"] == json.loads((folder / "head.json").read_text())["token"]
    assert node["all_reduce_within"]["ranks"] == 2 and node["all_reduce_within"]["bus_gb_per_s"] > 0
    assert abs(node["clock_at_meeting"] - time.time()) < 300 and node["free_gb"]["run_folder"] > 0


def test_judge_passes_them(good):
    folder, _, _ = good
    judged = call("judge", "--records", folder, "--nodes", "node01,node02", "--gpus", 0)
    assert judged.returncode == 0, judged.stderr
    lines = judged.stdout.splitlines()
    assert lines[0].split()[:4] == ["node", "GPUs", "driver", "torch"] and lines[1].startswith("node01  CPU")
    assert lines[-1].endswith("4 ranks (gloo); every sum was right")
    assert json.loads((folder / "verdict.json").read_text()) == {"ok": True, "errors": [], "bad_nodes": []}


def test_judge_names_what_a_node_of_them_lacks(good, capsys):
    folder, _, _ = good
    assert judge(Wanted(folder, ["node01", "node02", "node03"], gpus=0)) == 2
    assert capsys.readouterr().err.startswith("error: node03: left no record")
    assert judge(Wanted(folder, ["node01", "node02"], gpus=0, minimum=1e6)) == 2
    assert "at least 1e+06 are needed" in capsys.readouterr().err


def test_planted_records_have_the_keys_of_real_ones(good, tmp_path):
    """Else the tests of the judge would show nothing."""
    planted, (real, _, _) = write_records(tmp_path / "r", 2), good
    for name in ("head.json", "all_reduce.json", "node-node01.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (planted, real))
        assert ours.keys() == theirs.keys(), name
        for key in ("versions", "free_gb", "all_reduce_within"):
            if key in theirs:
                assert ours[key].keys() == theirs[key].keys(), key


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What ranks do in worlds of which all but the first are broken: {name: (folder of records, [rank's end, ...])}."""
    base = tmp_path_factory.mktemp("broken")
    run_folder = base / "run"
    run_folder.mkdir()
    faults = {
        "three_nodes": [{}, {}, {}],
        "missing": [{}, None],
        "no_rank_0": [None, {}],
        "wrong_sum": [{}, {"fault": "wrong_sum"}],
        "killed": [{}, {"fault": "killed"}],
        "hangs": [{}, {"fault": "hangs"}],
        "unshared": [{}, {"records": str(base / "local-disk")}],
        "unshared_and_killed": [{"fault": "lingers"}, {"records": str(base / "local-disk")}],
        "few_gpus": [{"gpus": 1, "fault": "one_gpu"}, {"gpus": 1, "fault": "no_gpu"}],
    }
    scenarios = {}
    for name, ranks in faults.items():
        folder = base / name
        folder.mkdir()
        (folder / records.HEAD).write_text(json.dumps({"token": name, "run_folder": str(run_folder), "versions": {}}))
        known = [{"rank": i, "node": f"node0{i + 1}", "records": str(folder), **rank} for i, rank in enumerate(ranks) if rank is not None]
        scenarios[name] = {"ranks": known, "size": len(ranks), "seconds": SECONDS if name in ("missing", "no_rank_0", "hangs") else ENOUGH}
        scenarios[name]["kill_on_bad_exit"] = name == "unshared_and_killed"
    (base / "scenarios.json").write_text(json.dumps(scenarios))
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.preflight_ranks", str(base / "scenarios.json")]
    done = subprocess.run(command, cwd=ROOT, env=quiet_environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return {name: (base / name, ends) for name, ends in json.loads(done.stdout).items()}


def test_neighbours_are_measured_two_by_two(broken, capsys):
    folder, ends = broken["three_nodes"]
    assert [end["code"] for end in ends] == [0, 0, 0], ends
    for node, others in (("node01", {"node02", "node03"}), ("node02", {"node01", "node03"}), ("node03", {"node01", "node02"})):
        pairs = json.loads((folder / f"node-{node}.json").read_text())["all_reduce_with"]
        assert pairs.keys() == others and all(pair["ranks"] == 2 and pair["bus_gb_per_s"] > 0 for pair in pairs.values())
    assert judge(Wanted(folder, ["node01", "node02", "node03"], gpus=0)) == 0
    assert "with neighbours" in capsys.readouterr().out


def judged(folder, capsys, gpus=0):
    code = judge(Wanted(folder, ["node01", "node02"], gpus=gpus))
    verdict = json.loads((folder / "verdict.json").read_text())
    assert code == 2 and not verdict["ok"] and verdict["errors"]
    assert capsys.readouterr().err.splitlines() == [f"error: {line}" for line in verdict["errors"]]
    return verdict


def one_line(end) -> str:
    lines = end["stderr"].splitlines()
    assert end["code"] == 2 and len(lines) == 1 and lines[0].startswith("error: node0"), end
    return lines[0]


def test_a_missing_rank_is_named_and_waited_for_no_longer_than_told(broken, capsys):
    folder, (end,) = broken["missing"]
    assert f"rank 1 did not arrive within {SECONDS} s" in one_line(end) and end["seconds"] < 3 * SECONDS + 10
    verdict = judged(folder, capsys)
    assert verdict["bad_nodes"] == ["node02"] and verdict["errors"][0].startswith("node02: left no record")


def test_without_rank_0_the_others_say_so(broken, capsys):
    folder, (end,) = broken["no_rank_0"]
    assert "found no rank 0 at 127.0.0.1" in one_line(end) and end["seconds"] < 3 * SECONDS + 10
    verdict = judged(folder, capsys)
    assert verdict["bad_nodes"] == ["node01"] and "node01: left no record" in "".join(verdict["errors"])


def test_a_wrong_sum_names_the_rank(broken, capsys):
    folder, ends = broken["wrong_sum"]
    assert ends[0]["code"] == 0 and "all-reduce gave a wrong sum: 3 to 4 instead of 3" in one_line(ends[1])
    verdict = judged(folder, capsys)
    assert verdict["bad_nodes"] == ["node02"] and verdict["errors"][0].startswith("node02: rank 1: all-reduce gave a wrong sum")


def test_a_rank_killed_during_the_all_reduce_ends_the_other(broken, capsys):
    folder, ends = broken["killed"]
    assert ends[1]["code"] == -9 and "all-reduces" in one_line(ends[0]) and "rank that was killed" in ends[0]["stderr"]
    assert judged(folder, capsys)["bad_nodes"] == []  # who has seen a peer go is not to blame


def test_a_rank_that_hangs_in_the_all_reduce_ends_with_the_others(broken, capsys):
    folder, ends = broken["hangs"]
    lines = [one_line(end) for end in ends]  # one of them may see the other go at the moment of its own deadline
    assert any(f"did not end within {SECONDS} s" in line for line in lines) and all("all-reduces" in line for line in lines)
    assert all(end["seconds"] < 3 * SECONDS + 10 for end in ends)
    assert judged(folder, capsys)["bad_nodes"] == []


def test_a_folder_that_is_not_shared_is_found_at_once(broken, capsys):
    folder, ends = broken["unshared"]
    assert ends[0]["code"] == 2 and "does not see" in one_line(ends[1]) and ends[0]["seconds"] < ENOUGH / 2
    verdict = judged(folder, capsys)
    assert verdict["bad_nodes"] == ["node02"] and len(verdict["errors"]) == 1
    assert "on a file system that all nodes share" in verdict["errors"][0]
    assert not (folder.parent / "local-disk").exists()


def test_rank_0_has_written_what_it_knows_before_srun_ends_it_with_the_rank_that_fails(broken, capsys):
    folder, ends = broken["unshared_and_killed"]
    assert ends[0]["code"] == -15 and "does not see" in one_line(ends[1])
    verdict = judged(folder, capsys)
    assert verdict["bad_nodes"] == ["node02"] and len(verdict["errors"]) == 1 and "all nodes share" in verdict["errors"][0]


def test_a_node_with_too_few_gpus_stops_all_before_nccl_starts(broken, capsys):
    folder, ends = broken["few_gpus"]
    assert "has 0 GPUs that torch can use, 1 are needed" in one_line(ends[1])
    verdict = judged(folder, capsys, gpus=1)
    assert verdict["bad_nodes"] == ["node02"] and len(verdict["errors"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rank"], "RANK: is not set; start `preflight.py rank` with srun"),
        (["judge", "--nodes", "a,a"], "--nodes: is 'a,a'; name every node once"),
        (["judge", "--nodes", "a", "--min-bandwidth-gbps", "nan"], "--min-bandwidth-gbps: is nan; give 0 or more"),
        (["rank", "--timeout-seconds", "0"], "--timeout-seconds: is 0; give a number above 0"),
    ],
)
def test_bad_environment_and_arguments_are_one_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.setattr(sys, "argv", ["preflight.py", *arguments, "--records", str(tmp_path)])
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stopped:
        run_command(preflight.main)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith(f"error: {words}") and err.count("\n") == 1
