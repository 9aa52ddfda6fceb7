"""config.json of a checkpoint: checked when read, and written so that every transformers reads the same rotary table.

What transformers does with rotary keys changed twice: 4.43 introduced `rope_type` (before: `type`), 5.0 moved theta and
scaling into `rope_parameters` and, alone, writes only that; 4.x then finds no scaling and theta 10000, silently. So an
export carries top-level `rope_theta`, `rope_scaling` and `rope_parameters`, all saying the same.

Checked by building the rotary embedding of LLaMA and Mistral from exported files of every scaling, and comparing
inv_freq, attention factor and cos at positions up to the target, in transformers 4.43.4, 4.46.3, 4.47.1, 4.48.3, 4.50.3,
4.51.3, 4.52.4, 4.53.3, 4.55.4, 4.56.2, 4.57.6, 5.0.0, 5.5.0 and 5.23.0, and plain LLaMA in 4.40.2. `oldest_transformers`
says which of them read a file right; older ones fail loudly (LLaMA below 4.43) or read it wrong without a word (Mistral
below 4.48, YaRN below 4.51).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from endprompt.errors import UserError
from endprompt.rope import RopeScaling, attention_factor, effective_theta, inverse_frequencies

DEFAULT_THETA = 10000.0
"""What transformers assumes for LLaMA and Mistral when config.json has no theta (meta-llama/Llama-2-7b-hf has none)."""

RECORD = "endprompt_rope"
"""Key of config.json that keeps the scaling behind a `longrope` table, which alone would not tell its parameters."""

_CAUSAL_LM = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_COUNTS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {"yarn": ("beta_fast", "beta_slow", "attention_factor")}
_NEUTRAL: dict[str, tuple] = {
    "partial_rotary_factor": (1, None),
    "truncate": (True, None),
    "mscale": (0, 1, None),
    "mscale_all_dim": (0, None),
}
"""Values of further keys that leave the formula of `rope.py` as it is."""


def load_hf_config(directory: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder, as it is on disk.

    Raises UserError when it is missing, not JSON, not a plain LLaMA or Mistral causal language model, quantised, or
    when it has features that this project would change silently (sliding window, biases, an unsupported rotary type).
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise UserError(path, "not found", "set model.path to the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(path, f"not valid JSON ({error})", "download the file again") from None
    check_hf_config(config, path)
    return config


def check_hf_config(config: Any, path: str | Path) -> None:
    """Raise UserError, naming `path`, for what `load_hf_config` refuses in a config.json that has been read already."""
    if not isinstance(config, dict):
        raise UserError(path, f"holds a {type(config).__name__}, not an object", "download the file again")
    _check_architecture(config, path)
    _check_counts(config, path)
    rope_of_config(config, path)


def head_dim_of(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def key_value_heads_of(config: dict[str, Any]) -> int:
    """LLaMA-1 and 2 checkpoints may leave the key out: then every query head has its own."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _check_architecture(config: dict[str, Any], path: str | Path) -> None:
    kind = config.get("model_type")
    if kind not in _CAUSAL_LM:
        raise UserError(f"{path}: model_type", f"{kind!r} is not supported", f"use one of {', '.join(_CAUSAL_LM)}")
    classes = config.get("architectures") or [_CAUSAL_LM[kind]]
    if classes != [_CAUSAL_LM[kind]]:
        raise UserError(f"{path}: architectures", f"{classes} is not a causal language model", f"use a {_CAUSAL_LM[kind]} checkpoint")
    if config.get("quantization_config"):
        settings = config["quantization_config"]
        method = settings.get("quant_method", "unknown method") if isinstance(settings, dict) else settings
        raise UserError(f"{path}: quantization_config", f"weights are quantised ({method})", "use the bf16 or fp16 checkpoint")
    if config.get("sliding_window") is not None:
        raise UserError(
            f"{path}: sliding_window",
            f"attention is limited to {config['sliding_window']} tokens, so the terminal prompt would not see most of the body",
            "use a full-attention checkpoint (Mistral-7B v0.2 or later); setting it to null changes the model",
        )
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, plain) != plain:
            raise UserError(f"{path}: {key}", f"{config[key]!r} is not supported", f"use a checkpoint with {key} {json.dumps(plain)}")


def _check_counts(config: dict[str, Any], path: str | Path) -> None:
    for key in _COUNTS:
        if key not in config:
            raise UserError(f"{path}: {key}", "is missing", "download the file again")
    for key in (*_COUNTS, "num_key_value_heads", "head_dim"):
        value = config.get(key)
        if value is None and key not in _COUNTS:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{path}: {key}", f"must be a whole number above 0, found {value!r}", "download the file again")
    heads, groups = config["num_attention_heads"], key_value_heads_of(config)
    if heads % groups:
        raise UserError(f"{path}: num_key_value_heads", f"{groups} does not divide {heads} attention heads", "download the file again")
    if config["hidden_size"] % heads:
        raise UserError(
            f"{path}: num_attention_heads", f"{heads} does not divide hidden_size {config['hidden_size']}", "download the file again"
        )
    if head_dim_of(config) % 2 or head_dim_of(config) < 4:
        raise UserError(f"{path}: head_dim", f"must be even and at least 4, found {head_dim_of(config)}", "download the file again")


def rope_of_config(config: dict[str, Any], where: str | Path = "config.json") -> RopeScaling:
    """The rotary embedding that a checkpoint has, from old (`rope_scaling`) or new (`rope_parameters`) keys.

    The tables of our own exports come back as they went in, except ntk, which is a plain larger theta by then.
    Raises UserError for types that depend on the sequence length (dynamic), learned tables (longrope of others),
    keys that change the formula, and for old and new keys that disagree.
    """
    found = [config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)]
    if not all(isinstance(entry, dict) for entry in found):
        raise UserError(f"{where}: rope_scaling", "is not an object", "download the file again")
    candidates = [_read_parameters(entry, config, where) for entry in found] or [_read_parameters({}, config, where)]
    if candidates[0] != candidates[-1]:
        raise UserError(
            f"{where}: rope_parameters", f"{candidates[0]} disagrees with rope_scaling, {candidates[-1]}", "make both say the same"
        )
    return candidates[0]


def _read_parameters(entry: dict[str, Any], config: dict[str, Any], where: str | Path) -> RopeScaling:
    kind = entry.get("rope_type") or entry.get("type") or "default"
    theta = entry.get("rope_theta") or config.get("rope_theta") or DEFAULT_THETA
    if kind == "longrope" and RECORD in config:
        return _read_record(entry, config, theta, where)
    if kind not in _REQUIRED:
        raise UserError(f"{where}: rope_scaling", f"type {kind!r} is not supported", f"use a checkpoint with one of {', '.join(_REQUIRED)}")
    known = {"rope_type", "type", "rope_theta", *_REQUIRED[kind], *_OPTIONAL.get(kind, ()), *_NEUTRAL}
    for key, value in entry.items():
        if key not in known or value not in _NEUTRAL.get(key, (value,)):
            raise UserError(f"{where}: rope_scaling.{key}", f"{value!r} changes {kind} in a way not supported", "use another checkpoint")
    for key in _REQUIRED[kind]:
        if key not in entry:
            raise UserError(f"{where}: rope_scaling.{key}", f"is missing, {kind} needs it", "add it as the model's authors state it")
    for key in ("rope_theta", *_REQUIRED[kind], *_OPTIONAL.get(kind, ())):
        value = theta if key == "rope_theta" else entry.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf")):
            raise UserError(f"{where}: rope_scaling.{key}", f"must be a number above 0, found {value!r}", "correct it")
    numbers = {key: float(entry[key]) for key in entry if key in (*_REQUIRED[kind], *_OPTIONAL.get(kind, ())) and entry[key] is not None}
    original = numbers.pop("original_max_position_embeddings", None)
    try:
        return RopeScaling(
            type="none" if kind == "default" else kind,
            theta=float(theta),
            head_dim=head_dim_of(config),
            original_length=int(original) if original else None,
            **numbers,
        )
    except ValueError as error:
        raise UserError(f"{where}: rope_scaling", str(error), "correct it as the model's authors state it") from None


def _read_record(entry: dict[str, Any], config: dict[str, Any], theta: float, where: str | Path) -> RopeScaling:
    """Our export of llama3 with interpolation: the recorded parameters must reproduce the table that others read."""
    try:
        scaling = RopeScaling(**config[RECORD])
        expected = torch.tensor(_longrope_factors(scaling))
        tables = [torch.tensor(entry[key], dtype=torch.float64) for key in ("short_factor", "long_factor")]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {RECORD}", f"cannot be read ({error})", "export the checkpoint again") from None
    agree = all(table.shape == expected.shape and torch.allclose(table, expected.double(), rtol=1e-6) for table in tables)
    if not agree or theta != scaling.theta or scaling.head_dim != head_dim_of(config) or entry.get("attention_factor") != 1.0:
        raise UserError(f"{where}: {RECORD}", "does not describe the longrope table beside it", "export the checkpoint again")
    return scaling


def extended_config(config: dict[str, Any], scaling: RopeScaling, target_length: int) -> dict[str, Any]:
    """A copy of `config` whose rotary keys say `scaling` and whose window is `target_length` tokens.

    ntk is written as its plain larger theta. llama3 with interpolation has no name in transformers; it is written as
    `longrope` with short_factor == long_factor, a table that no position can switch, and attention factor 1.
    """
    new = {key: value for key, value in config.items() if key not in ("original_max_position_embeddings", RECORD)}
    parameters = _write_parameters(scaling, target_length)
    theta = effective_theta(scaling)
    new["max_position_embeddings"] = target_length
    new["head_dim"] = scaling.head_dim  # left out, yarn and longrope fail for Mistral in 4.52 to 4.57
    new["rope_theta"] = theta
    new["rope_scaling"] = None if parameters["rope_type"] == "default" else {"type": parameters["rope_type"], **parameters}
    new["rope_parameters"] = {**parameters, "rope_theta": theta}
    if parameters["rope_type"] == "longrope":
        new[RECORD] = {key: value for key, value in vars(scaling).items() if value is not None}
    return new


def oldest_transformers(config: dict[str, Any], scaling: RopeScaling, target_length: int) -> str:
    """First transformers release that reads an export of this scaling right; goes into the model card.

    YaRN: until 4.50 the ramp was computed from the extended window; until 4.55 the factor was taken from the ratio of
    the windows, which is right only where the two agree. Mistral had no rope scaling at all before 4.48.
    """
    if scaling.type in ("none", "ntk"):
        return "4.40"
    if scaling.type == "yarn":
        return "4.51" if scaling.factor == target_length / scaling.original_length else "4.56"
    return "4.48" if config["model_type"] == "mistral" else "4.43"


def _write_parameters(scaling: RopeScaling, target_length: int) -> dict[str, Any]:
    if scaling.type in ("none", "ntk"):
        return {"rope_type": "default"}
    if scaling.type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    if scaling.type == "yarn":
        return {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "attention_factor": attention_factor(scaling),
        }
    if scaling.interpolation == 1.0:
        return {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_length,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    factors = _longrope_factors(scaling)
    # original == maximum: readers that ignore attention_factor (vLLM) derive 1 from their ratio.
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "original_max_position_embeddings": target_length,
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
    }


def _longrope_factors(scaling: RopeScaling) -> list[float]:
    """ext_j of inv_freq_j = 1 / (ext_j * theta^(2j/D)): the plain frequency over ours, [head_dim // 2]."""
    plain = inverse_frequencies(RopeScaling("none", scaling.theta, scaling.head_dim)).double()
    return (plain / inverse_frequencies(scaling).double()).tolist()
