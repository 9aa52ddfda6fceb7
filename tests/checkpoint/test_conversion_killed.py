"""kill -9 at any moment, in each direction: the target is absent or complete, and --resume ends with the same bytes."""

from __future__ import annotations

import random
import shutil
import signal
import time

import pytest

from endprompt.checkpoint.conversion import partial_paths
from endprompt.errors import UserError
from tests.support.checkpoints import make_family
from tests.support.conversions import convert, read_files, start

KILLS = 30
DIRECTIONS = ("to megatron", "to huggingface")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """(source, files of an undisturbed conversion) by direction."""
    place = tmp_path_factory.mktemp("sources")
    folders = {"to megatron": make_family("llama3 (GQA)", place / "hf")}
    convert("to megatron", folders["to megatron"], place / "megatron")
    folders["to huggingface"] = place / "megatron"
    convert("to huggingface", place / "megatron", place / "back")
    results = {"to megatron": place / "megatron", "to huggingface": place / "back"}
    return {direction: (folders[direction], read_files(result)) for direction, result in results.items()}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_killed_at_random_moments(direction, sources, tmp_path):
    source, whole = sources[direction]
    target, rng = tmp_path / "out", random.Random(0)
    partial, journal = partial_paths(target)
    start(direction, source, tmp_path / "first").join()  # starts the server that the others come from
    kills, finished, journaled = 0, 0, set()
    while kills < KILLS:
        process = start(direction, source, target, delay=0.002, resume=True)
        deadline = time.monotonic() + 5
        while not journal.exists() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if target.exists():
            finished += 1
            assert read_files(target) == whole
            shutil.rmtree(target)
            journal.unlink(missing_ok=True)
        elif journal.exists():
            journaled.add(journal.read_text().count("\n"))
    assert len(journaled) > 3, "the kills came at different stages"
    assert partial.exists() or not journal.exists() or journal.read_text().count("\n") <= 1
    process = start(direction, source, target, resume=True)
    process.join()
    assert process.exitcode == 0 and read_files(target) == whole
    assert not partial.exists() and not journal.exists()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_resume_keeps_what_was_there(direction, sources, tmp_path):
    source, whole = sources[direction]
    target = tmp_path / "out"
    partial, journal = partial_paths(target)
    process = start(direction, source, target, delay=0.01)
    while not journal.exists() or journal.read_text().count("\n") < 6:
        time.sleep(0.005)
    process.kill()
    process.join()
    inodes = {path.name: path.stat().st_ino for path in partial.iterdir()}
    tasks = journal.read_text().count("\n")
    assert tasks >= 6 and not target.exists()
    process = start(direction, source, target, resume=True)
    process.join()
    assert read_files(target) == whole
    assert all((target / name).stat().st_ino == inode for name, inode in inodes.items()), "the same files were gone on with"


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("moment", ["before rename", "after rename"])
def test_killed_beside_the_rename(direction, moment, sources, tmp_path):
    source, whole = sources[direction]
    target = tmp_path / "out"
    process = start(direction, source, target, kill_at=moment)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert target.exists() == (moment == "after rename")
    if target.exists():
        assert read_files(target) == whole
    process = start(direction, source, target, resume=True)
    process.join()
    assert process.exitcode == 0 and read_files(target) == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_without_resume_a_new_start_begins_anew(sources, tmp_path):
    source, whole = sources["to megatron"]
    process = start("to megatron", source, tmp_path / "out", kill_at="before rename")
    process.join()
    convert("to megatron", source, tmp_path / "out")
    assert read_files(tmp_path / "out") == whole


def test_resume_of_another_job_is_refused_and_touches_nothing(sources, tmp_path):
    source, _ = sources["to megatron"]
    process = start("to megatron", source, tmp_path / "out", kill_at="before rename")
    process.join()
    before = read_files(tmp_path)
    with pytest.raises(UserError, match="other options"):
        convert("to megatron", source, tmp_path / "out", resume=True, vocabulary_multiple=128)
    assert read_files(tmp_path) == before


def test_two_at_once_are_refused(sources, tmp_path):
    source, whole = sources["to megatron"]
    process = start("to megatron", source, tmp_path / "out", delay=0.02)
    while not list(tmp_path.glob(".out.partial/*")):
        time.sleep(0.005)
    with pytest.raises(UserError, match="another conversion"):
        convert("to megatron", source, tmp_path / "out")
    process.join()
    assert process.exitcode == 0 and read_files(tmp_path / "out") == whole
