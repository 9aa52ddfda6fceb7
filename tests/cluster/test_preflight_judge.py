"""Every guard of the judge fires on the fault planted in otherwise good records: one line, the node, the remedy, the verdict."""

import json

import pytest

from endprompt.cluster.preflight.judge import Wanted, judge
from endprompt.cluster.preflight.pairs import rounds
from tests.support.preflight_records import error_record, names, write_records


def judged(directory, count, capsys, **wanted):
    code = judge(Wanted(directory, names(count), **{"gpus": 8, **wanted}))
    out, err = capsys.readouterr()
    return code, out, err.splitlines(), json.loads((directory / "verdict.json").read_text())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_good_records_pass_with_a_table(tmp_path, capsys, count):
    code, out, lines, verdict = judged(write_records(tmp_path / "r", count), count, capsys)
    assert code == 0 and not lines and verdict == {"ok": True, "errors": [], "bad_nodes": []}
    assert " ".join(out.splitlines()[1].split()) == "node01 8 x NVIDIA H100 80GB HBM3 550.54.15 2.13.0 +0.000 s 370 GB/s " + (
        "330, 330 GB/s" if count > 2 else "-"
    )
    assert "310 GB/s bus" in out.splitlines()[-1] and f"{8 * count} ranks" in out


def at(path: str, value, node: str = "node03"):
    """Set a dotted field of the node's record (with node None: of all_reduce.json)."""

    def spoil(records):
        target = records["nodes"][node] if node else records["all_reduce"]
        *way, last = path.split(".")
        for key in way:
            target = target[int(key) if key.isdigit() else key]
        target[int(last) if last.isdigit() else last] = value

    return spoil


def slow_pairs(rate, *pairs):
    def spoil(records):
        for one, other in pairs:
            for node, neighbour in ((one, other), (other, one)):
                records["nodes"][node]["all_reduce_with"][neighbour]["bus_gb_per_s"] = rate

    return spoil


def drop(*nodes):
    def spoil(records):
        for node in nodes:
            del records["nodes"][node]

    return spoil


def error(*records_of_ranks):
    def spoil(records):
        records["errors"] = {record["rank"]: record for record in records_of_ranks}
        records["all_reduce"] = None

    return spoil


def both(*spoils):
    return lambda records: [spoil(records) for spoil in spoils]


H100 = "NVIDIA H100 80GB HBM3"
SEVEN = {"count": 7, "names": [H100] * 7, "driver": "550.54.15", "uncorrected_ecc": [0] * 7}
WRONG = error_record(20, "node03", "all-reduce gave a wrong sum: 1 to 2 instead of 3", "own")
MISSING = error_record(0, "node01", "ranks 22, 23 did not arrive", "elsewhere", [22, 23])
ALL_FAILED = [error_record(rank, f"node{1 + rank // 8:02d}", "the all-reduces failed", "unknown") for rank in range(32)]
ONE_NODE = {
    "no record": (drop("node03"), "left no record", "exclude the node"),
    "no token": (at("token", None), "saw no", "all nodes share"),
    "another token": (at("token", "old"), "saw another preflight's", "all nodes share"),
    "no run folder": (at("free_gb.run_folder", None), "does not see the run folder /shared/run", "set output.directory"),
    "seven GPUs": (at("gpus", SEVEN), "has 7 GPUs, 8", "exclude"),
    "other GPUs": (at("gpus.names.5", "NVIDIA A100"), f"GPUs NVIDIA A100 + {H100} (the others {H100})", "--constraint"),
    "other driver": (at("gpus.driver", "535.1"), "driver 535.1 (the others 550.54.15)", "exclude"),
    "other torch": (at("versions.torch", "2.6.0"), "torch 2.6.0 (the others 2.13.0)", "one container image"),
    "other megatron": (at("versions.megatron-core", "absent"), "megatron-core absent (the others 0.19.2)", "one environment"),
    "clock": (at("clock_at_meeting", 1016.5), "+6.5 s off", "chronyd"),
    "memory errors": (at("gpus.uncorrected_ecc.2", 4), "GPU 2: 4", "exclude the node"),
    "little shared memory": (at("free_gb./dev/shm", 0.064), "0.064 GB free in /dev/shm", "larger"),
    "slow NVLink": (at("all_reduce_within.bus_gb_per_s", 24.0), "24 GB/s bus among themselves", "nvidia-smi nvlink"),
    "half of the others": (at("all_reduce_within.bus_gb_per_s", 180.0), "180 GB/s bus among themselves, 185 are needed", "exclude"),
    "slow card": (slow_pairs(60.0, ("node02", "node03"), ("node03", "node04")), "60 with node04, 60 with node02 GB/s", "ib_write_bw"),
    "half as fast": (slow_pairs(160.0, ("node02", "node03"), ("node03", "node04")), "GB/s bus, 165 are needed", "ib_write_bw"),
    "slow NVLink shows in pairs too": (
        both(at("all_reduce_within.bus_gb_per_s", 24.0), slow_pairs(24.0, ("node02", "node03"), ("node03", "node04"))),
        "24 GB/s bus among themselves", "nvidia-smi nvlink",
    ),
    "wrong sum": (error(WRONG), "rank 20: all-reduce gave a wrong sum", "mend"),
    "missing ranks": (error(MISSING), "ranks 22, 23 did not come", "exclude"),
    "unshared, told by rank 0": (
        both(drop("node03"), error(*[error_record(r, "node03", "does not see DIR/head.json", "own") for r in range(16, 24)])),
        "ranks 16, 17, 18, 19, 20, 21, 22, 23: does not see", "mend",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ONE_NODE)
def test_a_fault_of_one_node_of_four_names_it_and_excludes_it(tmp_path, capsys, case):
    spoil, problem, remedy = ONE_NODE[case]
    code, out, lines, verdict = judged(write_records(tmp_path / "r", 4, spoil), 4, capsys)
    assert code == 2 and not out
    assert len(lines) == 1 and lines[0].startswith("error: node03:") and problem in lines[0]
    assert remedy in lines[0].split("; ", 1)[1]
    assert verdict == {"ok": False, "errors": [lines[0].removeprefix("error: ")], "bad_nodes": ["node03"]}


NOBODYS = {
    "slow everywhere": (at("bus_gb_per_s", 11.0, None), {}, "all-reduce over 32 ranks: 11 GB/s bus", 1),
    "slow between every two nodes": (
        both(at("bus_gb_per_s", 11.0, None), slow_pairs(11.0, *zip(names(4), [*names(4)[1:], "node01"], strict=True))),
        {}, "all-reduce over 32 ranks: 11 GB/s bus", 1,
    ),
    "below what was asked": (lambda records: None, {"minimum": 350.0}, "at least 350 are needed", 1),
    "below what the ranks were given": (at("minimum_gb_per_s", 350.0, None), {}, "at least 350 are needed", 1),
    "every node has too few": (lambda records: None, {"gpus": 9}, "has 8 GPUs, 9 were asked for", 4),
    "two drivers, half and half": (both(at("gpus.driver", "1", "node01"), at("gpus.driver", "1")), {}, "differ in driver", 1),
    "nobody left a record": (drop(*names(4)), {}, "left no record", 4),
    "no measurement": (lambda records: records.update(all_reduce=None), {}, "all_reduce.json: is not there", 1),
    "damaged record": (lambda records: records["nodes"].update(node02="{"), {}, "holds no JSON object", 1),
    "record of another version": (lambda records: records["nodes"]["node02"].pop("token"), {}, "'token'", 1),
    "a record that ends early": (lambda records: records["nodes"]["node02"].pop("clock_at_meeting"), {}, "node02: its record ends", 1),
    "no head": (lambda records: records.update(head=None), {}, "head.json: is not there", 1),
    "rank 0 is cut off": (error(error_record(3, "node01", "stopped because of others", "elsewhere")), {}, "stopped because of others", 1),
    "a collective failed": (error(*ALL_FAILED), {}, "failed", 4),
}  # fmt: skip


@pytest.mark.parametrize("case", NOBODYS)
def test_what_is_no_single_nodes_fault_excludes_nobody(tmp_path, capsys, case):
    spoil, wanted, problem, count = NOBODYS[case]
    code, _, lines, verdict = judged(write_records(tmp_path / "r", 4, spoil), 4, capsys, **wanted)
    assert code == 2 and len(lines) == count and all(problem in line and "; " in line for line in lines)
    assert verdict["bad_nodes"] == [] and not verdict["ok"]


def test_of_two_nodes_whose_clocks_differ_nobody_knows_which_is_right(tmp_path, capsys):
    records = write_records(tmp_path / "r", 2, at("clock_at_meeting", 1020.0, "node02"))
    code, _, lines, verdict = judged(records, 2, capsys)
    assert code == 2 and lines[0].startswith("error: node02: its clock is +10.0 s off") and verdict["bad_nodes"] == []
    assert judged(records, 2, capsys, skew=12.0)[0] == 0


def test_of_two_nodes_the_one_that_differs_from_the_batch_host_is_the_odd_one(tmp_path, capsys):
    _, _, lines, verdict = judged(write_records(tmp_path / "r", 2, at("versions.nccl", "2.20", "node02")), 2, capsys)
    assert "node02: has nccl 2.20 (the others 2.27.5)" in lines[0] and verdict["bad_nodes"] == ["node02"]


def test_faults_of_several_nodes_are_all_named(tmp_path, capsys):
    spoil = both(at("versions.torch", "2.6.0", "node02"), at("gpus.uncorrected_ecc.0", 1, "node04"), drop("node03"))
    code, _, lines, verdict = judged(write_records(tmp_path / "r", 6, spoil), 6, capsys)
    assert code == 2 and len(lines) == 3 and verdict["bad_nodes"] == ["node02", "node03", "node04"]


@pytest.mark.parametrize(("count", "bus", "ok"), [(1, 113, True), (1, 112, False), (2, 101, True), (2, 99, False)])
def test_default_minimum_is_a_quarter_of_the_links(tmp_path, capsys, count, bus, ok):
    """NVLink's 450 within a node, eight cards of 50 across."""

    def slow(records):
        records["all_reduce"].update(bus_gb_per_s=bus, line_rate_gb_per_s=450.0 if count == 1 else 400.0)

    assert (judged(write_records(tmp_path / "r", count, slow), count, capsys)[0] == 0) is ok


def test_one_slow_pair_blames_neither_of_the_two(tmp_path, capsys):
    """Both are fast with their other neighbour; if the link between them matters the all-reduce over all is slow."""
    assert judged(write_records(tmp_path / "r", 4, slow_pairs(60.0, ("node02", "node03"))), 4, capsys)[0] == 0


@pytest.mark.parametrize("count", range(2, 10))
def test_every_node_is_measured_with_two_neighbours_in_rounds_that_share_none(count):
    found = rounds(count)
    assert len(found) == (0 if count < 3 else 2 + count % 2)
    for pairs in found:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)
    uses = [node for pairs in found for pair in pairs for node in pair]
    assert all(uses.count(node) == (2 if count > 2 else 0) for node in range(count))


def test_over_gloo_any_bandwidth_passes_but_none(tmp_path, capsys):
    def on_cpus(bus):
        def spoil(records):
            records["all_reduce"].update(bus_gb_per_s=bus, line_rate_gb_per_s=None, backend="gloo")
            for node in records["nodes"].values():
                node.update(gpus=None, all_reduce_within=None, all_reduce_with={})

        return spoil

    assert judged(write_records(tmp_path / "a", 2, on_cpus(0.01)), 2, capsys, gpus=0)[0] == 0
    code, _, lines, _ = judged(write_records(tmp_path / "b", 2, on_cpus(0.0)), 2, capsys, gpus=0)
    assert code == 2 and "0 GB/s bus (gloo)" in lines[0]
