"""kill -9 at any moment: the next run finishes with the bytes of an unbroken one, and nobody meets half a dataset."""

import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from endprompt.data import open_indexed, write_indexed
from endprompt.data.merge import Split
from endprompt.data.prepare import Job
from tests.support.corpora import make_texts, write_jsonl
from tests.support.preparation import start_preparation

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = [f"data_{role}{suffix}" for role in ("train", "validation") for suffix in (".bin", ".idx", ".json")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_jsonl(folder / f"{number}.jsonl", make_texts(500, seed=number))
    return folder


@pytest.fixture(scope="module")
def unbroken(corpus, tokenizer_folder, tmp_path_factory):
    """The files of a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    run(job_in(folder, corpus, tokenizer_folder))
    return read_files(folder)


def job_in(folder, corpus, tokenizer_folder):
    return Job((str(corpus),), str(tokenizer_folder), str(folder / "data"), split=Split(validation_fraction=0.1))


def run(job, **options):
    process = start_preparation(job, **options)
    process.join()
    assert process.exitcode == 0


def read_files(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return {name: (folder / name).read_bytes() for name in FILES}


def test_killed_at_random_moments(corpus, tokenizer_folder, unbroken, tmp_path):
    job, rng = job_in(tmp_path, corpus, tokenizer_folder), random.Random(0)

    def finished_parts():
        return len(list(tmp_path.glob("data.parts/part-*.json")))

    counts = [0]
    for attempt in range(6):
        process = start_preparation(job, workers=1 + attempt % 3)
        goal = counts[-1] + rng.randint(0, 3)
        while process.is_alive() and finished_parts() < goal:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.02))  # a fast machine makes 30 parts in 0.1 s
        workers = psutil.Process(process.pid).children(recursive=True) if process.is_alive() else []
        process.kill()
        process.join()
        assert not psutil.wait_procs(workers, timeout=20)[1]  # workers notice that their parent is gone
        counts.append(finished_parts())
    assert counts == sorted(counts) and counts[1] < counts[-1]  # parts stay
    assert not (tmp_path / "data_train.idx").exists(), "the last kill too came before the end"
    run(job)
    assert read_files(tmp_path) == unbroken


def test_killed_before_each_rename(corpus, tokenizer_folder, unbroken, tmp_path):
    """Every run dies one rename later than the one before. Old datasets lie in the way, to be overwritten."""
    job = job_in(tmp_path, corpus, tokenizer_folder)
    old = {}
    for role in ("train", "validation"):
        write_indexed(tmp_path / f"data_{role}", [np.arange(50)], np.uint16)
        old |= {f"data_{role}{suffix}": (tmp_path / f"data_{role}{suffix}").read_bytes() for suffix in (".bin", ".idx")}
    for kill_at in range(1, 40):
        process = start_preparation(job, kill_at_rename=kill_at, overwrite=True)
        process.join()
        for role in ("train", "validation"):
            data, index = tmp_path / f"data_{role}.bin", tmp_path / f"data_{role}.idx"
            if index.exists():  # whoever sees an index sees the dataset whole, old or new
                open_indexed(tmp_path / f"data_{role}")
                whole = {path.name: path.read_bytes() for path in (data, index)}
                assert whole in ({name: files[name] for name in whole} for files in (old, unbroken))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert kill_at > 12  # 4 renames and 6 removals and 2 sidecars at least were died at
    assert read_files(tmp_path) == unbroken


def test_killed_between_renames_needs_no_overwrite(corpus, tokenizer_folder, unbroken, tmp_path):
    """The files that a killed run has put in place are its own: the next run of the same job may replace them."""
    job = job_in(tmp_path, corpus, tokenizer_folder)
    kill_at = 1
    while not list(tmp_path.glob("data_*.bin")):
        process = start_preparation(job, kill_at_rename=kill_at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kill_at += 1
    assert not list(tmp_path.glob("data_*.json"))
    run(job)
    assert read_files(tmp_path) == unbroken


def test_full_disk_is_one_line_and_can_be_gone_on_with(corpus, tokenizer_folder, tmp_path):
    command = [
        sys.executable, str(ROOT / "tools/prepare_data.py"), "--input", str(corpus), "--tokenizer", str(tokenizer_folder),
        "--output", str(tmp_path / "data"), "--workers", "2",
    ]  # fmt: skip
    limit = 100_000  # bytes a file may have; its signal is ignored by Python, so write() fails as on a full disk
    failed = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert failed.returncode == 2, failed.stderr
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1 and "File too large" in failed.stderr
    assert str(tmp_path / "data.parts") in failed.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data.parts"]
    run(Job((str(corpus),), str(tokenizer_folder), str(tmp_path / "data")), overwrite=True)  # overwrite: its shards are of another size
    open_indexed(tmp_path / "data")
