"""A byte-level BPE tokenizer from GGUF metadata, as the files that Hugging Face tokenizers load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from endprompt.atomic import write_json
from endprompt.errors import UserError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types; ordinary tokens are 1


def _byte_level(*before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)])


_PRE_TOKENIZERS = {
    # llama.cpp's name for the splitting rule, kept in `tokenizer.ggml.pre`
    "gpt-2": lambda: _byte_level(),
    "smollm": lambda: _byte_level(pre_tokenizers.Digits(individual_digits=True)),
}


def write_tokenizer(source: Path, fields: dict[str, Any], folder: Path, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    fields: the GGUF file's metadata by name. Raises UserError for a kind of tokenizer other than byte-level BPE with one
    of the splitting rules above, and for metadata that is missing.
    """
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or rule not in _PRE_TOKENIZERS or "tokenizer.ggml.merges" not in fields:
        raise UserError(
            source,
            f"its tokenizer is {kind} with the splitting rule {rule}",
            f"only byte-level BPE (gpt2) with {' or '.join(_PRE_TOKENIZERS)} is converted",
        )
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (index, AddedToken(tokens[index], special=kind == _CONTROL, normalized=False))
        for index, kind in enumerate(fields["tokenizer.ggml.token_type"])
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    for _, token in added:
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
    tokenizer.save(str(folder / "tokenizer.json"))

    ids = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {
        role: tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for role, name in ids.items() if f"tokenizer.ggml.{name}_token_id" in fields
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(index): {
                "content": token.content,
                "special": token.special,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "single_word": False,
            }
            for index, token in added
        },
        **special,
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
