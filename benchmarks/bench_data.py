#!/usr/bin/env python3
"""Time data preparation against the tokenizer alone, and the building of samples.

    python benchmarks/bench_data.py --output benchmarks/results/data.json
    python benchmarks/bench_data.py --tokenizer MODEL --input corpus.jsonl

Both sides start the same number of processes, load the tokenizer in each and encode the same documents in the same
batches; they take turns, `--rounds` times. The tokenizer alone gets its documents as ready strings and throws the
result away; preparation reads files and ends with a finished dataset. Without --input a corpus of made-up words is used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine
from endprompt.atomic import write_json
from endprompt.data.corpus import TextOptions, find_files, plan_segments
from endprompt.data.prepare import Job, prepare
from endprompt.data.readers import read_segment
from endprompt.data.samples import SampleDataset
from endprompt.data.shards import BATCH_BYTES
from endprompt.data.tokenizers import load_tokenizer
from endprompt.errors import run_command
from endprompt.positions import SampleBuilder, tokenize_prompts
from endprompt.recipe.schema import Positions, Source

SAMPLE_LENGTH = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="where to write the JSON result")
    parser.add_argument("--tokenizer", type=Path, help="Hugging Face folder (default: one trained on the made-up corpus)")
    parser.add_argument("--input", nargs="+", help="text to prepare (default: made-up words)")
    parser.add_argument("--megabytes", type=float, default=8.0, help="size of the made-up corpus")
    parser.add_argument("--processes", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), arguments)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure(folder: Path, arguments: argparse.Namespace) -> dict:
    inputs = arguments.input or [str(make_corpus(folder / "corpus.jsonl", arguments.megabytes))]
    tokenizer = arguments.tokenizer or make_tokenizer(folder / "tokenizer", Path(inputs[0]))
    share_files, text_bytes = write_shares(folder, inputs, arguments.processes)
    job = Job(inputs=tuple(inputs), tokenizer=str(tokenizer), output=str(folder / "data"))
    load_tokenizer(tokenizer)  # imports transformers, which no round should pay
    sides = {
        "tokenizer_alone": lambda: tokenize_alone(str(tokenizer), share_files),
        "prepare": lambda: prepare(job, workers=arguments.processes, overwrite=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, work in sides.items():
            before = cpu_time()
            seconds[name].append(timed(work))
            cpu_seconds[name].append(cpu_time() - before)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    cpu_medians = {name: statistics.median(times) for name, times in cpu_seconds.items()}
    return {
        "what": "seconds to prepare a corpus and to tokenize it only, process start included; milliseconds to build a sample",
        "machine": describe_machine(),
        "settings": {"processes": arguments.processes, "text_megabytes": round(text_bytes / 1e6, 2), "made_up": not arguments.input},
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
        "median_seconds": {name: round(t, 3) for name, t in medians.items()},
        "median_cpu_seconds": {name: round(t, 3) for name, t in cpu_medians.items()},
        "megabytes_per_second": round(text_bytes / 1e6 / medians["prepare"], 3),
        "speed_ratio": round(medians["tokenizer_alone"] / medians["prepare"], 3),
        "speed_ratio_by_cpu_seconds": round(cpu_medians["tokenizer_alone"] / cpu_medians["prepare"], 3),
        "sample_milliseconds": {scheme: sample_milliseconds(scheme, job, tokenizer) for scheme in ("endprompt", "pose")},
    }


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_time() -> float:
    """Seconds of processor time of this process and its finished children: steadier than wall time on a busy machine."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_corpus(path: Path, megabytes: float) -> Path:
    """JSON lines of 2 to 200 KB, words drawn by Zipf's law: as many distinct words as a real corpus of this size."""
    rng = random.Random(0)
    letters = "etaoinshrdlucmfwygpbvk"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 11))) for _ in range(60_000)]
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    written = 0
    with open(path, "w") as file:
        while written < megabytes * 1e6:
            drawn = rng.choices(words, weights, k=rng.choice([300, 1000, 3000, 30_000]))
            text = "".join(word + rng.choices((" ", ", ", ". ", "\n"), (85, 7, 7, 1))[0] for word in drawn)
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text)
    return path


def make_tokenizer(folder: Path, corpus: Path) -> Path:
    """A byte-level BPE with 16384 entries, split as GPT-2 and SmolLM2 do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=16384, special_tokens=["<|end|>"], show_progress=False)
    lines = (json.loads(line)["text"] for line in corpus.open())
    tokenizer.train_from_iterator((text for text, _ in zip(lines, range(100), strict=False)), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def write_shares(folder: Path, inputs: list[str], processes: int) -> tuple[list[str], int]:
    """Documents dealt out to processes, the longest first and each to the least loaded, as pickled batches of strings."""
    files, _, _ = find_files(inputs)
    options = TextOptions()
    documents = [document for segment in plan_segments(files, options, 2**23) for document in read_segment(segment, options)]
    shares: list[list] = [[] for _ in range(processes)]
    loads = [0] * processes
    for document in sorted(documents, key=lambda document: -document.text_bytes):
        least = loads.index(min(loads))
        shares[least].append(document)
        loads[least] += document.text_bytes
    paths = []
    for number, share in enumerate(shares):
        batches: list[list[str]] = [[]]
        size = 0
        for document in share:
            batches[-1].append(document.text)
            size += document.text_bytes
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
        path = folder / f"share-{number}.pickle"
        path.write_bytes(pickle.dumps(batches))
        paths.append(str(path))
    return paths, sum(loads)


def tokenize_alone(tokenizer: str, share_files: list[str]) -> None:
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_tokenize_share, args=(tokenizer, path)) for path in share_files]
    for process in running:
        process.start()
    for process in running:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"the tokenizer alone failed with exit code {process.exitcode}")


def _tokenize_share(tokenizer: str, path: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    for batch in pickle.loads(Path(path).read_bytes()):
        loaded.encode_batch_fast(batch, add_special_tokens=False)


def sample_milliseconds(scheme: str, job: Job, tokenizer: Path, count: int = 200) -> float:
    """Median time to build a sample of 8192 tokens for 65536 positions from the dataset just prepared."""
    positions = Positions(scheme=scheme, physical_length=SAMPLE_LENGTH)
    prompts = tokenize_prompts(positions, load_tokenizer(tokenizer))
    dataset = SampleDataset([Source(path=job.output)], SampleBuilder(positions, 8 * SAMPLE_LENGTH, prompts, 0), 0, vocab_size=10**6)
    return round(1000 * statistics.median(timed(lambda k=k: dataset[k]) for k in range(count)), 3)


if __name__ == "__main__":
    run_command(main)
