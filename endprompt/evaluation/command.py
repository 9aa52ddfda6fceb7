"""The arguments of tools/evaluate.py, checked before anything is loaded."""

from __future__ import annotations

import argparse
import difflib
import re
from pathlib import Path

import torch

from endprompt.errors import UserError
from endprompt.evaluation.distance import DistanceSettings, check_distances, default_distances
from endprompt.evaluation.model import DTYPES, CheckpointFacts, load_tokenizer, read_facts
from endprompt.evaluation.needle import NeedleSettings
from endprompt.evaluation.perplexity import PerplexitySettings
from endprompt.evaluation.suite import TASKS, Suite
from endprompt.evaluation.text import read_documents

ALL_GPUS = "cuda:all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", action="append", required=True, metavar="NAME=DIR", help="checkpoint folder and its name in tables; repeat"
    )
    parser.add_argument("--tasks", default="distance", metavar="A,B", help=f"of {', '.join(TASKS)} (default: distance)")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="results, report.json, report.md, report.png")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="plain UTF-8 text, one document a file; distance can do without"
    )
    parser.add_argument(
        "--target-length", type=int, metavar="N", help="positions stay below it (default: the longest window of the models)"
    )
    parser.add_argument(
        "--original-length", type=int, metavar="N", help="pre-trained window, for the report (default: the shortest of the models)"
    )
    parser.add_argument("--cases", type=int, default=32, metavar="N", help="distance: cases per distance (default 32)")
    parser.add_argument("--distances", type=int, nargs="+", metavar="D", help="distance: default doubles from 512 up to the target's end")
    parser.add_argument("--length", type=int, metavar="N", help="perplexity, needle: tokens really read (default: the target length)")
    parser.add_argument("--stride", type=int, metavar="N", help="perplexity: tokens between window starts (default: --length)")
    parser.add_argument(
        "--windows", type=int, default=8, metavar="N", help="perplexity: windows in all, spread over the documents (default 8)"
    )
    parser.add_argument(
        "--bucket", type=int, metavar="N", help="perplexity: positions per bucket (default: two log-spaced buckets per octave)"
    )
    parser.add_argument("--needle-lengths", type=int, nargs="+", metavar="N", help="needle: several lengths (default: --length)")
    parser.add_argument(
        "--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="X", help="needle: 0 start .. 1 end"
    )
    parser.add_argument("--needle-cases", type=int, default=4, metavar="N", help="needle: cases per depth (default 4)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of weights and activations (default bf16)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="D",
        help="cpu, cuda, cuda:N, or cuda:all to spread a model that is too large for one GPU over all of them by layers",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="distance: cases at a time (default 8)")


def build_suite(arguments: argparse.Namespace) -> tuple[Suite, int, int]:
    """(suite, original length, target length). Raises UserError for anything in the arguments that cannot be done."""
    for name in ("target_length", "original_length", "cases", "length", "stride", "windows", "bucket", "needle_cases", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"must be at least 1, found {value}", "correct it")
    tasks = _tasks(arguments.tasks)
    models = _models(arguments.model)
    target = arguments.target_length or max(facts.max_positions for facts in models.values())
    original = arguments.original_length or min(facts.rope.original_length or facts.max_positions for facts in models.values())
    if any(task != "distance" for task in tasks) and not arguments.text:
        raise UserError("--text", f"tasks {','.join(tasks)} need long documents", "name plain text files, or run --tasks distance alone")
    settings = {task: _SETTINGS[task](arguments, target) for task in tasks}
    device = _device("cuda" if arguments.device == ALL_GPUS else arguments.device)
    suite = Suite(
        models, settings, read_documents(arguments.text), arguments.output, arguments.dtype, device, arguments.batch_size,
        spread=arguments.device == ALL_GPUS,
    )  # fmt: skip
    return suite, original, target


def _tasks(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not chosen:
        raise UserError("--tasks", "names no task", f"choose of {', '.join(TASKS)}")
    for name in chosen:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1)
            raise UserError("--tasks", f"unknown task {name!r}", f"did you mean {near[0]}?" if near else f"choose of {', '.join(TASKS)}")
    return [task for task in TASKS if task in chosen]


def _models(given: list[str]) -> dict[str, CheckpointFacts]:
    models = {}
    for pair in given:
        name, equals, directory = pair.partition("=")
        if not equals or not directory:
            raise UserError(f"--model {pair}", "is not NAME=DIR", "write for instance --model base=path/to/checkpoint")
        if not re.fullmatch(r"[A-Za-z0-9._+-]+", name):
            raise UserError(f"--model {pair}", f"the name {name!r} cannot be part of a file name", "use letters, digits and . _ + -")
        if name in models:
            raise UserError(f"--model {pair}", f"the name {name} appears twice", "give every model its own name")
        models[name] = read_facts(directory)
        load_tokenizer(directory)
    return models


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError("--device", f"unknown device {name!r}", "use cpu, cuda, cuda:N or cuda:all") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError("--device", f"{name!r} is not supported", "use cpu, cuda, cuda:N or cuda:all")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError("--device", f"{name} is not there, this machine shows {torch.cuda.device_count()} GPUs", "use --device cpu")
    return device


def _distance(arguments: argparse.Namespace, target: int) -> DistanceSettings:
    distances = tuple(sorted(set(arguments.distances))) if arguments.distances else default_distances(target)
    settings = DistanceSettings(target, distances, arguments.cases, arguments.seed)
    check_distances(settings)
    return settings


def _perplexity(arguments: argparse.Namespace, target: int) -> PerplexitySettings:
    length = arguments.length or target
    if length < 2 or length > target:
        raise UserError("--length", f"{length} lies outside 2..{target}", "positions stay below --target-length: change one of the two")
    return PerplexitySettings(length, arguments.stride or length, arguments.windows, arguments.bucket)


def _needle(arguments: argparse.Namespace, target: int) -> NeedleSettings:
    lengths = tuple(sorted(set(arguments.needle_lengths or [arguments.length or target])))
    if lengths[-1] > target or lengths[0] < 1:
        raise UserError(
            "--needle-lengths", f"{lengths[-1]} lies outside 1..{target}", "positions stay below --target-length: change one of the two"
        )
    for depth in arguments.depths:
        if not 0 <= depth <= 1:
            raise UserError("--depths", f"{depth:g} lies outside 0..1", "0 is the start of the text, 1 its end")
    return NeedleSettings(lengths, tuple(sorted(set(arguments.depths))), arguments.needle_cases, arguments.seed)


_SETTINGS = {"distance": _distance, "perplexity": _perplexity, "needle": _needle}
