#!/usr/bin/env python3
"""Time and memory of checkpoint conversion, against a plain copy of the same bytes, and at the shape of LLaMA-3-70B.

    python benchmarks/bench_conversion.py --output benchmarks/results/conversion.json

Speed: a model of random numbers, both directions and a copy of the source (shutil.copyfile and fsync of each file) take
turns; source files are dropped from the page cache before each, and the output before it is off the disk. Other jobs and
virtual disks change speed within minutes, so the share of a copy's speed is the median of the rounds' shares.
Memory: a 70B model of 80 layers and 723 tensors whose numbers are holes in files: 141 GB are read, and neither hashed nor
written; and two of its layers, hashed and written.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine
from endprompt.atomic import write_json
from endprompt.checkpoint.conversion import default_workers
from endprompt.checkpoint.safetensors_files import SafetensorsFolder
from endprompt.errors import run_command
from tests.support.conversions import convert, peak_memory
from tests.support.sparse import make_sparse_checkpoint

BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
"""LLaMA-3.2-1B's shapes; --layers of its 16 layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="where to write the JSON result")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--layers", type=int, default=16, help="of the model whose conversion is timed (default: 16, 2.47 GB)")
    parser.add_argument("--large-layers", type=int, default=80, help="of the 70B model whose memory is measured (default: 80)")
    parser.add_argument("--folder", type=Path, help="disk to measure (default: the temporary folder's)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = {
            "what": "seconds to convert and to copy; peak resident memory of a process that converts",
            "machine": describe_machine(),
            "speed": measure_speed(Path(folder), arguments.layers, arguments.rounds),
            "memory_70b": measure_memory(Path(folder), arguments.large_layers),
        }
    result["predicted_70b"] = predict(result)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure_speed(folder: Path, layers: int, rounds: int) -> dict:
    source, middle = folder / "hf", folder / "megatron"
    make_sparse_checkpoint(source, shard_gb=0.6, num_hidden_layers=layers, **BILLION)
    fill(source)
    convert("to megatron", source, middle)
    size = sum(info.bytes for info in SafetensorsFolder(source).tensors.values())
    work = {
        "copy": lambda out: copy(source, out),
        "to_megatron": lambda out: convert("to megatron", source, out, workers=default_workers()),
        "to_huggingface": lambda out: convert("to huggingface", middle, out, workers=default_workers()),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    processor: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for name in sorted(work, key=lambda name: (list(work).index(name) + number) % len(work)):  # each is first once
            for place in (source, middle):
                forget(place)
            began, before = time.perf_counter(), time.process_time()
            work[name](folder / "out")
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - before)
            shutil.rmtree(folder / "out")
            os.sync()  # or the disk frees these gigabytes while the next one is timed
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    shares = {name: [a / b for a, b in zip(seconds["copy"], seconds[name], strict=True)] for name in ("to_megatron", "to_huggingface")}
    for place in (source, middle):
        shutil.rmtree(place)
    return {
        "gigabytes": round(size / 1e9, 3),
        "threads": default_workers(),
        "seconds": {name: [round(t, 2) for t in times] for name, times in seconds.items()},
        "processor_seconds_per_gigabyte": {name: round(statistics.median(t) / size * 1e9, 2) for name, t in processor.items()},
        "load_average_of_the_machine": round(os.getloadavg()[0], 1),
        "median_megabytes_per_second": {name: round(size / 1e6 / t) for name, t in medians.items()},
        "share_of_copy_speed": {name: round(statistics.median(share), 3) for name, share in shares.items()},
        "share_of_copy_speed_by_round": {name: [round(value, 2) for value in share] for name, share in shares.items()},
    }


def fill(folder: Path) -> None:
    """Random bytes for the numbers (any bits do: nothing looks at them), with a finite exponent."""
    block = os.urandom(2**22)
    for name, header in SafetensorsFolder(folder).files.items():
        with open(folder / name, "r+b") as file:
            file.seek(min(header.starts.values()))
            left = sum(info.bytes for info in header.tensors.values())
            while left:
                left -= file.write(block[:left])
            os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        descriptor = os.open(target / path.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that each round reads the disk."""
    for path in folder.glob("*.*"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure_memory(folder: Path, layers: int) -> dict:
    source, middle, results = folder / "hf70", folder / "megatron70", {}
    architecture = make_sparse_checkpoint(source, num_hidden_layers=layers)
    reader = SafetensorsFolder(source)
    largest, size = (f(info.bytes for info in reader.tensors.values()) for f in (max, sum))
    for name, direction, place, out in (
        ("to_megatron", "to megatron", source, middle), ("to_huggingface", "to huggingface", middle, folder / "back70"),
    ):  # fmt: skip
        began = time.perf_counter()
        results[name] = {"peak_megabytes": round(peak_memory(direction, place, out, drop=True) / 1e6)}
        results[name]["seconds"] = round(time.perf_counter() - began, 1)
    for place in (source, middle, folder / "back70"):
        shutil.rmtree(place)
    two = folder / "hf70-2"
    make_sparse_checkpoint(two, num_hidden_layers=2)
    for name, direction, place, out in (
        ("to_megatron_2_layers", "to megatron", two, folder / "m2"),
        ("to_huggingface_2_layers", "to huggingface", folder / "m2", folder / "b2"),
    ):
        results[name] = {"peak_megabytes": round(peak_memory(direction, place, out) / 1e6)}
    return {
        "layers": architecture.layers, "tensors": len(reader.tensors), "gigabytes": round(size / 1e9, 1),
        "largest_tensor_megabytes": round(largest / 1e6), "allowed_megabytes": round(3 * largest / 1e6 + 600), **results,
    }  # fmt: skip


def predict(result: dict) -> dict:
    """Of LLaMA-3-70B on this machine's disk: 70.55e9 parameters of 2 bytes at the speeds measured on the smaller model."""
    size = 141.1e9
    speed = result["speed"]["median_megabytes_per_second"]
    return {
        "disk_gigabytes": size / 1e9,
        "minutes": {name: round(size / 1e6 / speed[name] / 60, 1) for name in ("to_megatron", "to_huggingface")},
        "memory_megabytes": max(result["memory_70b"][name]["peak_megabytes"] for name in ("to_megatron", "to_huggingface")),
    }


if __name__ == "__main__":
    run_command(main)
