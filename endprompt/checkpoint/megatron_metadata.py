"""endprompt_model.json: what a Megatron checkpoint does not say of its own model, and an export must not guess.

torch_dist files hold tensors and nothing of rope, window, vocabulary or origin. Exporters that take those from the training
arguments drop the rope scaling and write the training length into config.json. So both the training engine and
`tools/hf_to_megatron.py` put this file beside the tensors, and `tools/megatron_to_hf.py` reads it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.atomic import write_json
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling

FACTS = "endprompt_model.json"
SCHEMA = 1


@dataclass(frozen=True)
class ModelFacts:
    """Contents of endprompt_model.json.

    architecture: of the checkpoint that was started from (its `rope` and `original_length` are those before this project).
    rope, target_length: what the weights beside it are used with; lengths in tokens. padded_vocab_size: rows of the
    embedding in the Megatron checkpoint, at least architecture.vocab_size. dtype: bf16 or fp32 that an export casts to, None
    to keep each tensor's own. hf_config: config.json of the source, unchanged. source: its folder, as it was then.
    source_hashes: sha256 of its files. recipe: the resolved recipe, None where nothing was trained.
    """

    architecture: Architecture
    rope: RopeScaling
    original_length: int
    target_length: int
    padded_vocab_size: int
    dtype: str | None
    hf_config: dict[str, Any]
    source: str
    source_hashes: dict[str, str]
    recipe: dict[str, Any] | None = None

    @property
    def tied(self) -> bool:
        return self.architecture.tied


def write_model_facts(
    folder: str | Path,
    recipe: Recipe | None,
    architecture: Architecture,
    hf_config: dict[str, Any],
    rope: RopeScaling,
    *,
    source: str | Path | None = None,
    source_hashes: dict[str, str] | None = None,
    padded_vocab_size: int | None = None,
) -> None:
    """Write endprompt_model.json into `folder`, atomically.

    recipe: of the training run; None for a conversion, whose window and dtypes stay as config.json has them.
    hf_config: config.json of the source checkpoint (`load_hf_config`). source: its folder, the recipe's model.path when left
    out. source_hashes: {file name: sha256} of what is known of it; the hash of config.json is added where the file is there.
    padded_vocab_size: rows of the embedding beside it, the vocabulary's own size when left out.
    """
    source = Path(source or (recipe.model.path if recipe else "."))
    hashes = dict(source_hashes or {})
    if "config.json" not in hashes and (source / "config.json").is_file():
        hashes["config.json"] = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    facts = ModelFacts(
        architecture=architecture,
        rope=rope,
        original_length=architecture.original_length,
        target_length=recipe.target_length if recipe else hf_config["max_position_embeddings"],
        padded_vocab_size=padded_vocab_size or architecture.vocab_size,
        dtype=recipe.output.export_dtype if recipe else None,
        hf_config=hf_config,
        source=str(source),
        source_hashes=hashes,
        recipe=recipe.model_dump(mode="json") if recipe else None,
    )
    write_json(Path(folder) / FACTS, {"schema": SCHEMA, **dataclasses.asdict(facts)})


def read_model_facts(folder: str | Path) -> ModelFacts | None:
    """The facts beside a Megatron checkpoint, None where it has none. Raises UserError for a file that cannot be understood."""
    path = Path(folder) / FACTS
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content.pop("schema")
        if schema != SCHEMA:
            raise UserError(path, f"has schema {schema!r}, this release reads {SCHEMA}", "use the release that wrote it")
        architecture = dict(content.pop("architecture"))
        base_rope = RopeScaling(**architecture.pop("rope"))
        facts = ModelFacts(architecture=Architecture(rope=base_rope, **architecture), rope=RopeScaling(**content.pop("rope")), **content)
        _check(facts)
        return facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise UserError(path, problem, "remove it and pass --hf-config with the original checkpoint") from None


def _check(facts: ModelFacts) -> None:
    counts = (facts.original_length, facts.target_length, facts.padded_vocab_size, facts.architecture.layers)
    if not all(isinstance(count, int) and count > 0 for count in counts) or not isinstance(facts.hf_config, dict):
        raise ValueError("lengths and sizes must be whole numbers above 0 and hf_config an object")
    if facts.padded_vocab_size < facts.architecture.vocab_size:
        raise ValueError(f"padded_vocab_size {facts.padded_vocab_size} is below vocab_size {facts.architecture.vocab_size}")
    if facts.dtype not in (None, "bf16", "fp32"):
        raise ValueError(f"dtype {facts.dtype!r} is none of bf16, fp32")
