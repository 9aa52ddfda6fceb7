"""Evaluate several checkpoints on several tasks: every (model, task) is measured once and saved before the next begins."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from endprompt.evaluation import distance, needle, perplexity
from endprompt.evaluation.distance import DistanceSettings
from endprompt.evaluation.model import DTYPES, CheckpointFacts, EvaluationModel, load_model, load_tokenizer
from endprompt.evaluation.needle import NeedleSettings
from endprompt.evaluation.perplexity import PerplexitySettings
from endprompt.evaluation.results import checkpoint_identity, load_result, result_file, save_result, settings_key
from endprompt.evaluation.text import Document, Filler

TASKS = ("distance", "perplexity", "needle")

Settings = DistanceSettings | PerplexitySettings | NeedleSettings


@dataclass(frozen=True)
class Suite:
    """models: by the name they have in tables; tasks: settings by task name; documents: may be empty for distance alone.

    spread: each model over all GPUs instead of on `device` alone.
    """

    models: dict[str, CheckpointFacts]
    tasks: dict[str, Settings]
    documents: list[Document]
    output: Path
    dtype: str
    device: torch.device
    batch_size: int
    spread: bool = False


def run_suite(suite: Suite) -> dict[str, dict[str, dict]]:
    """Saved results (`results.save_result`) by task and model name, measured now or found finished.

    Inputs of everything still to do are built first, so that text which is too short is met before hours of work.
    """
    found: dict[str, dict[str, dict]] = {task: {} for task in suite.tasks}
    inputs: dict[tuple[str, str], Any] = {}  # by tokenizer and task: models of one family share them
    for name, facts in suite.models.items():
        for task, settings in suite.tasks.items():
            path, (key, _) = result_file(suite.output, name, task), _decisive(suite, facts, task)
            if finished := load_result(path, key):
                found[task][name] = finished
                tqdm.write(f"{name}: {task}: finished before, kept ({path})")
            elif (_tokenizer_digest(facts), task) not in inputs:
                inputs[_tokenizer_digest(facts), task] = _build(task, load_tokenizer(facts.directory), suite, settings)
    for name, facts in suite.models.items():
        model = None  # one at a time, and only if it has something left to do
        for task in suite.tasks:
            if name not in found[task]:
                model = model or load_model(facts, DTYPES[suite.dtype], suite.device, spread=suite.spread)
                began = time.monotonic()
                result = _measure(task, model, inputs[_tokenizer_digest(facts), task], suite, name)
                key, settings = _decisive(suite, facts, task)
                path = result_file(suite.output, name, task)
                found[task][name] = save_result(path, facts, task, key, settings, suite.device, time.monotonic() - began, result)
    return {task: {name: found[task][name] for name in suite.models} for task in suite.tasks}


def _tokenizer_digest(facts: CheckpointFacts) -> str:
    return hashlib.sha256((facts.directory / "tokenizer.json").read_bytes()).hexdigest()


def _decisive(suite: Suite, facts: CheckpointFacts, task: str) -> tuple[str, dict]:
    """(hash, contents) of all that decides a result. Device and batch size change only rounding and are left out."""
    settings = {
        "task": task,
        **asdict(suite.tasks[task]),
        "dtype": suite.dtype,
        "text": [[document.name, document.digest] for document in suite.documents],
        "checkpoint": checkpoint_identity(facts),
    }
    return settings_key(settings), settings


def _build(task: str, tokenizer: PreTrainedTokenizerBase, suite: Suite, settings: Settings):
    if task == "perplexity":
        return perplexity.choose_windows(tokenizer, suite.documents, settings)
    builder = distance.build_cases if task == "distance" else needle.build_cases
    return builder(tokenizer, Filler(suite.documents), settings)


def _measure(task: str, model: EvaluationModel, inputs, suite: Suite, label: str) -> dict:
    if task == "distance":
        return distance.measure_distance(model, inputs, suite.tasks[task], suite.batch_size, label)
    if task == "perplexity":
        return perplexity.measure_perplexity(model, inputs, suite.tasks[task], label)
    return needle.measure_needle(model, inputs, label)
