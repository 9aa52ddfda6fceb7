"""tools/evaluate.py as a user runs it: outputs, restarts, and one clear line for bad input."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from endprompt.errors import run_command
from endprompt.evaluation import suite as suite_module
from endprompt.evaluation.command import add_arguments, build_suite

TOOL = Path(__file__).resolve().parents[2] / "tools" / "evaluate.py"


@pytest.fixture
def evaluate(monkeypatch):
    """Run the tool's main in this process with the given arguments."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
        tool.main()

    return run


def measure(*arguments) -> dict:
    """What the tool does before it reports."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return suite_module.run_suite(build_suite(parser.parse_args([str(word) for word in arguments]))[0])


@pytest.fixture
def exits_2(evaluate, capsys):
    """Run it as the command does and return its one line of error."""

    def run(*arguments) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_command(lambda: evaluate(*arguments))
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in error
        return error

    return run


def small(checkpoint, novel, output, *more) -> list:
    return [
        "--model", f"one={checkpoint}", "--output", output, "--tasks", "needle,distance,perplexity", "--text", novel,
        "--dtype", "fp32",
        "--device", "cpu", "--target-length", 2048, "--cases", 2, "--length", 512, "--windows", 2, "--needle-cases", 1,
        "--depths", 0.5, *more,
    ]  # fmt: skip


def results(output) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text()) for path in sorted((output / "results").iterdir())}


@pytest.fixture
def count_measurements(monkeypatch):
    done = []
    original = suite_module._measure

    def counting(task, model, inputs, suite, label):
        done.append((label, task))
        return original(task, model, inputs, suite, label)

    monkeypatch.setattr(suite_module, "_measure", counting)
    return done


def test_whole_command_on_two_models(checkpoint, novel, tmp_path):
    second = shutil.copytree(checkpoint, tmp_path / "second")
    output = tmp_path / "out"
    command = [sys.executable, TOOL, *small(checkpoint, novel, output, "--model", f"two={second}")]
    finished = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert finished.returncode == 0, finished.stderr
    for words in (
        "Distance probe",
        "Perplexity by position",
        "Needle in a real context",
        str(output / "report.png"),
        str(output / "report.json"),
    ):
        assert words in finished.stdout
    assert "it/s" not in finished.stderr  # no progress bars where nobody watches
    assert (output / "report.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((output / "report.json").read_text())
    assert report["target_length"] == 2048 and report["original_length"] == 128
    assert list(report["results"]) == ["distance", "perplexity", "needle"]
    for task, by_model in report["results"].items():
        assert list(by_model) == ["one", "two"]
        one, two = (by_model[name] for name in ("one", "two"))
        assert one["result"] == two["result"], f"{task}: the same weights measured twice"
        assert one["provenance"]["rope"] == "plain rope (theta 10000)" and one["provenance"]["torch"] and one["settings"]["dtype"] == "fp32"
    assert [row["distance"] for row in report["results"]["distance"]["one"]["result"]["distances"]] == [512, 1024, 1536]
    assert "| distance | one | two |" in (output / "report.md").read_text()


def test_restart_measures_only_what_is_missing(checkpoint, novel, tmp_path, count_measurements, monkeypatch, capsys):
    arguments = small(checkpoint, novel, tmp_path / "out")
    stop = suite_module.perplexity.measure_perplexity
    monkeypatch.setattr(suite_module.perplexity, "measure_perplexity", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        measure(*arguments)
    assert list(results(tmp_path / "out")) == ["one.distance.json"]

    monkeypatch.setattr(suite_module.perplexity, "measure_perplexity", stop)
    count_measurements.clear()
    measure(*arguments)
    assert count_measurements == [("one", "perplexity"), ("one", "needle")]
    assert "one: distance: finished before" in capsys.readouterr().out

    before = results(tmp_path / "out")
    monkeypatch.setattr(suite_module, "load_model", lambda *_: pytest.fail("nothing is left to measure"))
    measure(*arguments, "--batch-size", 1)  # changes only rounding
    assert results(tmp_path / "out") == before


@pytest.mark.parametrize(
    "change, again",
    [
        (["--seed", 7], "distance needle"),
        (["--cases", 3], "distance"),
        (["--windows", 1], "perplexity"),
        (["--depths", 0.4], "needle"),
        (["--dtype", "bf16"], "distance perplexity needle"),
        ("weights", "distance perplexity needle"),
        ("text", "distance perplexity needle"),
    ],
    ids=str,
)
def test_changed_settings_measure_again(checkpoint, novel, tmp_path, count_measurements, change, again):
    folder, text = shutil.copytree(checkpoint, tmp_path / "model"), Path(shutil.copy(novel, tmp_path / "novel.txt"))
    arguments = small(folder, text, tmp_path / "out")
    measure(*arguments)
    count_measurements.clear()
    if change == "weights":
        os.utime(folder / "model.safetensors", ns=(1, 1))
    elif change == "text":
        text.write_text(text.read_text() + " One more sentence.")
    measure(*arguments, *(change if isinstance(change, list) else []))
    assert [task for _, task in count_measurements] == again.split()


def test_damaged_result_is_named(checkpoint, novel, tmp_path, exits_2):
    arguments = small(checkpoint, novel, tmp_path / "out")
    measure(*arguments)
    path = tmp_path / "out" / "results" / "one.needle.json"
    path.write_text("{")
    assert str(path) in exits_2(*arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--tasks", "distance,perplexty"], "--tasks: unknown task 'perplexty'; did you mean perplexity?"),
        (["--tasks", ","], "--tasks: names no task"),
        (["--model", "two"], "--model two: is not NAME=DIR"),
        (["--model", "two="], "--model two=: is not NAME=DIR"),
        (["--model", "a/b=x"], "cannot be part of a file name"),
        (["--model", "two=nowhere"], "nowhere: no such checkpoint folder"),
        (["--model", "one={checkpoint}"], "the name one appears twice"),
        (["--text", "nowhere.txt"], "nowhere.txt: no such text file"),
        (["--text", "{short}"], "short.txt: holds no text"),
        (["--tasks", "perplexity", "--text", "{paragraph}"], "longest document has"),
        (["--distances", "512", "4096"], "--distances: 4096 lies outside 512..1536"),
        (["--distances", "100"], "--distances: 100 lies outside"),
        (["--target-length", "600"], "--target-length: 600 is too short"),
        (["--text", "{paragraph}"], "tokens, a context needs"),
        (["--length", "4096"], "--length: 4096 lies outside 2..2048"),
        (["--needle-lengths", "400", "9000"], "--needle-lengths: 9000 lies outside"),
        (["--needle-lengths", "90"], "--needle-lengths: 90 is too short"),
        (["--needle-lengths", "0"], "--needle-lengths: 0 lies outside"),
        (["--depths", "0.5", "1.5"], "--depths: 1.5 lies outside 0..1"),
        (["--cases", "0"], "--cases: must be at least 1, found 0"),
        (["--batch-size", "-1"], "--batch-size: must be at least 1"),
        (["--cases", "many"], "argument --cases: invalid int value"),
        (["--dtype", "fp8"], "argument --dtype: invalid choice"),
        (["--device", "cuda:99"], "--device: cuda:99 is not there"),
        (["--device", "gpu"], "--device: unknown device 'gpu'"),
        (["--device", "meta"], "--device: 'meta' is not supported"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_gives_one_line_and_leaves_nothing(checkpoint, novel, tmp_path, exits_2, change, message):
    (tmp_path / "short.txt").write_text("\n")
    (tmp_path / "paragraph.txt").write_text("Only a few words.")
    places = {"checkpoint": checkpoint, "short": tmp_path / "short.txt", "paragraph": tmp_path / "paragraph.txt"}
    error = exits_2(*small(checkpoint, novel, tmp_path / "out"), *(word.format(**places) for word in change))
    assert message in error
    assert not (tmp_path / "out").exists()


def test_long_tasks_need_text(checkpoint, tmp_path, exits_2):
    arguments = ["--model", f"one={checkpoint}", "--output", tmp_path / "out", "--target-length", 2048]
    assert "--text: tasks perplexity need long documents" in exits_2(*arguments, "--tasks", "perplexity")
