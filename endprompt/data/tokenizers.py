"""The tokenizer of a checkpoint folder, loaded without ever asking the network."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from endprompt.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SETTING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder.

    Raises UserError if the folder or its vocabulary is missing or damaged, or if it has no fast (Rust) form.
    """
    tokenizer_fingerprint(directory)  # transformers 5 makes up an empty vocabulary for a folder that has none
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # the Rust library raises plain Exception for a damaged tokenizer.json
        detail = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(directory, f"its tokenizer cannot be loaded ({detail})", "copy the tokenizer files again") from error
    if not tokenizer.is_fast:
        raise UserError(directory, f"{type(tokenizer).__name__} has no fast form", "add a tokenizer.json (transformers can convert most)")
    return tokenizer


def tokenizer_fingerprint(directory: str | Path) -> dict[str, str]:
    """sha256 of each tokenizer file of the folder, by name. Raises UserError if there is no vocabulary."""
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(directory, "no such tokenizer folder", "give the folder that holds tokenizer.json")
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        raise UserError(directory, "holds no tokenizer", f"copy {' or '.join(VOCABULARY_FILES)} of the checkpoint there")
    names = [name for name in VOCABULARY_FILES + SETTING_FILES if (folder / name).is_file()]
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sorted(names)}
