"""Worker processes: what they tell the parent, and what happens when one of them fails."""

import gzip
import io
import threading
import time
from pathlib import Path

import psutil
import pytest
from tqdm import tqdm

from endprompt.data import prepare as preparation
from endprompt.data.prepare import prepare
from endprompt.errors import UserError
from tests.support.corpora import make_texts, write_jsonl
from tests.support.preparation import job_for


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "corpus").mkdir()
    return tmp_path / "corpus"


def test_a_killed_worker_is_one_line(folder, tokenizer_folder, monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", (4000, 4000))
    write_jsonl(folder / "long.jsonl", make_texts(3000, longest=400))

    def kill_one():
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            workers = [child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())]
            if workers and list(Path(folder.parent / "out").rglob("part-*.json")):
                workers[0].kill()
                return
            time.sleep(0.01)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(UserError, match="a worker process died, perhaps for lack of memory; run the same command again"):
        prepare(job_for(folder, tokenizer_folder), workers=2)
    killer.join()


def test_progress_is_told_within_a_shard_and_adds_up(folder, tokenizer_folder, monkeypatch):
    """The bar moves while one shard is worked on, and ends at the size of the corpus."""
    bars = []

    class Recorder(tqdm):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **{**named, "disable": False, "file": io.StringIO()})
            self.seen = [self.n]
            bars.append(self)

        def update(self, n=1):
            super().update(n)
            self.seen.append(self.n)

    monkeypatch.setattr(preparation, "tqdm", Recorder)
    corpus = write_jsonl(folder / "a.jsonl", make_texts(3000))
    monkeypatch.setattr(preparation, "SHARD_BYTES", (10**9, 10**9))
    prepare(job_for(folder, tokenizer_folder), workers=1)
    (bar,) = bars
    assert bar.total == corpus.stat().st_size == bar.seen[-1] and bar.seen == sorted(bar.seen)
    assert any(0 < n < bar.total for n in bar.seen)


def test_bad_input_stops_the_other_workers_in_mid_shard(folder, tmp_path, tokenizer_folder):
    plain = write_jsonl(tmp_path / "long.jsonl", make_texts(6000))
    (folder / "long.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes(), 1))  # one shard of several seconds
    (folder / "short.jsonl").write_text("not json\n")
    job = job_for(folder, tokenizer_folder)
    with pytest.raises(UserError, match=r"short\.jsonl: line 1"):
        prepare(job, workers=2)
    assert [path.name for path in Path(f"{job.output}.parts").iterdir()] == ["job.json"]
