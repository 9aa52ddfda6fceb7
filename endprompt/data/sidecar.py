"""PREFIX.json beside a dataset: how it was made and what is in it. Datasets of Megatron's own tools have none."""

from __future__ import annotations

import json
from pathlib import Path

from endprompt.errors import UserError


def sidecar_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.json")


def read_sidecar(prefix: str | Path) -> dict | None:
    """What PREFIX.json says of a dataset; None where there is none. Raises UserError if it is damaged."""
    path = sidecar_path(prefix)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    whole = isinstance(found, dict) and isinstance(found.get("max_token_id", 0), int) and isinstance(found.get("tokenizer", {}), dict)
    if not whole:
        raise UserError(path, "is not the sidecar of a dataset", "remove it or prepare the dataset again")
    return found
