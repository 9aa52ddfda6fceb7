"""One JSON file per (model, task), written whole or not at all, and reused while nothing that decides its numbers changes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from endprompt.atomic import write_json
from endprompt.errors import UserError
from endprompt.evaluation.model import CheckpointFacts
from endprompt.rope import describe

METHOD = 1
"""Raised by whoever changes what a task measures, so that results of the older method are made again."""


def checkpoint_identity(facts: CheckpointFacts) -> dict[str, Any]:
    """What tells a checkpoint from a later one in the same folder: contents of the small files, size and time of the weights.

    Weights are not hashed: 16 GB take a minute, and writing them again changes their time.
    """
    small = [facts.directory / name for name in ("config.json", "tokenizer.json", "tokenizer_config.json")]
    weights = sorted(facts.directory.glob("*.safetensors"))
    return {
        **{path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small if path.is_file()},
        **{path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights},
    }


def settings_key(settings: dict[str, Any]) -> str:
    """Hash of everything that decides a result's numbers."""
    return hashlib.sha256(json.dumps({"method": METHOD, **settings}, sort_keys=True).encode()).hexdigest()[:16]


def result_file(output: Path, model: str, task: str) -> Path:
    return output / "results" / f"{model}.{task}.json"


def load_result(path: Path, key: str) -> dict[str, Any] | None:
    """The finished result at `path` if it was made with these settings, else None. Raises UserError for a damaged file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["key"] == key else None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UserError(path, "is not a result of this tool", "remove the file; its measurement is made again") from None


def save_result(
    path: Path, facts: CheckpointFacts, task: str, key: str, settings: dict, device: torch.device, seconds: float, result: dict
) -> dict:
    """Write one result with its provenance, atomically, and return what was written."""
    whole = {
        "task": task,
        "key": key,
        "settings": settings,
        "provenance": {
            "model": str(facts.directory),
            "rope": describe(facts.rope),
            "max_position_embeddings": facts.max_positions,
            "seconds": round(seconds, 1),
            **machine(device),
        },
        "result": result,
    }
    write_json(path, whole)
    return whole


def machine(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, without names of hosts or people."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
    }
