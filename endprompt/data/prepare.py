"""Corpus to indexed dataset, in several processes, restartable at any moment, with bytes that depend on the input only.

The corpus is cut into shards whose cut depends on the input alone. Workers turn shards into part files in PREFIX.parts/,
each whole or absent; then the parts are joined in order, documents are split into training and validation by number, and
the finished files are renamed into place. A second run skips what is done. The sidecar PREFIX.json, written last, says
that the dataset is finished, from what, and by which settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from endprompt.atomic import write_json
from endprompt.data.corpus import TextOptions, find_files, plan_segments
from endprompt.data.indexed import dtype_for
from endprompt.data.merge import Split, finished_outputs, merge_parts, output_prefixes, refuse_existing
from endprompt.data.shards import Encoding, Part, Shard, find_part, start_worker, tokenize_shard
from endprompt.data.tokenizers import load_tokenizer, tokenizer_fingerprint
from endprompt.errors import UserError

SHARD_BYTES = (256 * 2**10, 8 * 2**20)
"""Smallest and largest shard: 0.3 s and 10 s of work for one process at 0.8 MB/s. Between them 1/64 of the corpus."""


JOB_NOTE = "job.json"
"""Names the settings that the parts beside it were made by."""


@dataclass(frozen=True)
class Job:
    """What to prepare. Every field but `output` decides the bytes of the result.

    inputs: files, folders, glob patterns. tokenizer: Hugging Face folder. output: prefix of the dataset.
    max_documents: keep only the first documents of the corpus, counted without empty ones.
    """

    inputs: tuple[str, ...]
    tokenizer: str
    output: str
    text: TextOptions = TextOptions()
    append_eos: bool = True
    add_bos: bool = False
    split: Split = Split()
    max_documents: int | None = None


@dataclass(frozen=True)
class Result:
    """prefixes: the datasets written. finished_before: nothing was done, they were there. ignored: files of other types."""

    prefixes: list[Path]
    finished_before: bool
    ignored: int


def prepare(job: Job, *, workers: int | None = None, overwrite: bool = False) -> Result:
    """Make the dataset(s) of a job, or finish what an earlier run left.

    workers: processes, the cores of this machine when None. overwrite: replace datasets and parts of other settings.
    Raises UserError for bad input, for output that exists and is not this job's, and for parts of another job.
    """
    files, sources, ignored = find_files(list(job.inputs))
    segment_bytes = min(max(sum(source["bytes"] for source in sources) // 64, SHARD_BYTES[0]), SHARD_BYTES[1])
    settings = _settings(job, files, segment_bytes)
    outputs = output_prefixes(job.output, job.split)
    parts = Path(f"{job.output}.parts")
    if not overwrite and finished_outputs(outputs, settings):
        shutil.rmtree(parts, ignore_errors=True)  # left where a run was killed after its last rename
        return Result(list(outputs.values()), finished_before=True, ignored=ignored)
    stale = _stale_parts(parts, settings["encoding"], overwrite)
    if not overwrite:
        refuse_existing(outputs, parts, settings)
    encoding, tokenizer_facts = _encoding(job)
    shards = _shards(plan_segments(files, job.text, segment_bytes), segment_bytes)

    if stale:
        shutil.rmtree(parts)
    write_json(parts / JOB_NOTE, settings["encoding"])
    pool = _Pool(encoding, parts, _hash(settings["encoding"]), workers or len(os.sched_getaffinity(0)), job.max_documents)
    done = pool.run(shards)
    facts = {"tokenizer": tokenizer_facts, "sources": sources, "eos_token_id": encoding.eos_id, "bos_token_id": encoding.bos_id}
    merge_parts(done, parts, outputs, job.split, job.max_documents, np.dtype(encoding.dtype), settings, facts)
    shutil.rmtree(parts)
    return Result(list(outputs.values()), finished_before=False, ignored=ignored)


def _settings(job: Job, files: list[Path], segment_bytes: int) -> dict:
    """All that decides the output: `encoding` the parts, the rest only how they are joined.

    Files count by name, size and time of change, so that a corpus may move to another folder.
    """
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    encoding = {
        "sources": _hash(stats),
        "segment_bytes": segment_bytes,
        "tokenizer": tokenizer_fingerprint(job.tokenizer),
        "text_field": job.text.text_field,
        "separator": job.text.separator,
        "append_eos": job.append_eos,
        "add_bos": job.add_bos,
    }
    return {"encoding": encoding, "split": asdict(job.split) if job.split.wanted else None, "max_documents": job.max_documents}


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _stale_parts(folder: Path, encoding: dict, overwrite: bool) -> bool:
    """Whether the folder of parts is of another job and must go. Raises UserError unless it may."""
    if not folder.exists():
        return False
    try:
        earlier = dict(json.loads((folder / JOB_NOTE).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        if any(not path.name.endswith(".tmp") for path in folder.iterdir()):
            raise UserError(folder, f"holds no {JOB_NOTE}, so it is not ours", "remove it or choose another --output") from None
        return True  # killed before its first file was whole
    differing = sorted(key for key in encoding if earlier.get(key) != encoding[key])
    if differing and not overwrite:
        raise UserError(folder, f"holds parts of another job (differs in {', '.join(differing)})", "remove it or give --overwrite")
    return bool(differing)


def _encoding(job: Job) -> tuple[Encoding, dict]:
    """How workers encode, and what the sidecar says of the tokenizer."""
    tokenizer = load_tokenizer(job.tokenizer)
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    if job.append_eos and tokenizer.eos_token_id is None:
        raise UserError(job.tokenizer, "the tokenizer has no end-of-text token", "set eos_token in its config or give --no-append-eos")
    if job.add_bos and tokenizer.bos_token_id is None:
        raise UserError(job.tokenizer, "the tokenizer has no beginning-of-text token", "leave out --add-bos")
    encoding = Encoding(
        tokenizer_json=tokenizer.backend_tokenizer.to_str(),
        bos_id=tokenizer.bos_token_id if job.add_bos else None,
        eos_id=tokenizer.eos_token_id if job.append_eos else None,
        dtype=dtype_for(vocab_size).name,
        text=job.text,
    )
    name = Path(job.tokenizer).resolve().name
    return encoding, {"name": name, "sha256": tokenizer_fingerprint(job.tokenizer), "vocab_size": vocab_size}


def _shards(segments: list, shard_bytes: int) -> list[Shard]:
    """Consecutive segments grouped up to shard_bytes; a segment above that is a shard of its own."""
    groups: list[list] = []
    room = 0
    for segment in segments:
        if not groups or segment.size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(segment)
        room -= segment.size
    return [Shard(number, tuple(group)) for number, group in enumerate(groups)]


class _Pool:
    """Worker processes that make the parts that are missing."""

    def __init__(self, encoding: Encoding, folder: Path, settings: str, workers: int, max_documents: int | None):
        self.encoding, self.folder, self.settings = encoding, folder, settings
        self.workers, self.max_documents = workers, max_documents

    def run(self, shards: list[Shard]) -> list[Part]:
        """Parts of all shards, or of as many from the first on as max_documents needs. Shows a progress bar in bytes."""
        dtype = np.dtype(self.encoding.dtype)
        found = (find_part(self.folder, shard.number, self.settings, dtype) for shard in shards)
        done = {part.number: part for part in found if part}
        missing = [shard for shard in shards if shard.number not in done]
        if self.max_documents is None:
            missing.sort(key=lambda shard: -shard.size)  # a novel that is one shard must not come last and be waited for
        before = sum(shard.size for shard in shards) - sum(shard.size for shard in missing)
        if missing:
            self._work(missing, done, before)
        return [done[number] for number in sorted(done)]

    def _work(self, missing: list[Shard], done: dict[int, Part], before: int) -> None:
        context = get_context("spawn")  # fork is unsafe once the tokenizer or pyarrow has started threads
        progress, stop = context.Value("q", 0), context.Event()
        total = before + sum(shard.size for shard in missing)
        bar = tqdm(
            total=total, initial=before, unit="B", unit_scale=True, desc="tokenizing", disable=not sys.stderr.isatty(), file=sys.stderr
        )  # fmt: skip
        pool = ProcessPoolExecutor(
            min(self.workers, len(missing)), context, start_worker, (self.encoding, self.folder, self.settings, progress, stop)
        )
        with bar, pool:
            running: set[Future] = set()
            upcoming = self._needed(missing, done)
            try:
                while True:
                    while len(running) < 2 * self.workers and (shard := next(upcoming, None)):
                        running.add(pool.submit(tokenize_shard, shard))
                    if not running:
                        break
                    finished, running = wait(running, timeout=0.25, return_when=FIRST_COMPLETED)
                    done.update((part.number, part) for part in (future.result() for future in finished))
                    bar.update(before + progress.value - bar.n)
            except BrokenProcessPool:
                raise UserError(
                    self.folder, "a worker process died, perhaps for lack of memory", "run the same command again with fewer --workers"
                ) from None
            finally:
                stop.set()

    def _needed(self, missing: list[Shard], done: dict[int, Part]) -> Iterator[Shard]:
        """Shards to start, asked one at a time: none once the finished parts before it hold max_documents."""
        for shard in missing:
            before = (part.documents for part in done.values() if part.number < shard.number)
            if self.max_documents is not None and sum(before) >= self.max_documents:
                return
            yield shard
