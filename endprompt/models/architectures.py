"""Facts of the supported checkpoints: enough to plan a run without the weights, and to notice the wrong checkpoint.

Numbers are those of the checkpoints' own config.json. `custom` in a recipe takes every fact from config.json instead.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from endprompt.errors import UserError
from endprompt.models.hf_config import head_dim_of, key_value_heads_of, rope_of_config
from endprompt.rope import RopeScaling, describe

if TYPE_CHECKING:
    from endprompt.recipe.schema import Recipe

CUSTOM = "custom"


@dataclass(frozen=True)
class Architecture:
    """A LLaMA-style decoder: RMSNorm, rotary attention with grouped queries, SwiGLU, no biases.

    ffn_size: inner width of the SwiGLU. kv_heads: key/value heads (grouped-query attention). original_length: tokens of
    the pre-trained window. rope: the rotary embedding it was pre-trained with. tied: the output head is the embedding.
    tokenizer: family whose token ids it reads; `any` where config.json is the only source.
    """

    name: str
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    original_length: int
    rope: RopeScaling
    tied: bool = False
    tokenizer: str = "any"

    @property
    def layer_parameters(self) -> int:
        """Matrices of one layer (q, k, v, o, gate, up, down) and its two norms."""
        attention = 2 * self.hidden_size * (self.heads + self.kv_heads) * self.head_dim
        return attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size

    @property
    def embedding_parameters(self) -> int:
        """The input embedding alone; an untied output head has as many again."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """Every trained number: embedding, layers, final norm, and the output head where it is its own matrix."""
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return embeddings + self.layers * self.layer_parameters + self.hidden_size

    @property
    def matmul_parameters(self) -> int:
        """Numbers that a token is multiplied with: layer matrices and the output head, tied or not; norms and lookup are not."""
        return self.layers * (self.layer_parameters - 2 * self.hidden_size) + self.embedding_parameters


def forward_flops_per_token(architecture: Architecture, physical_length: int) -> float:
    """FLOPs of one forward pass over a sequence of `physical_length` tokens, per token.

    2 per matmul parameter, and causal attention: scores and weighted values are 2 * 2 * heads * head_dim per visible
    token and layer, of which a token sees (n + 1) / 2 on average. Norms, rotary and softmax (under 1 %) are not counted.
    """
    visible = (physical_length + 1) / 2
    attention = 4 * architecture.layers * architecture.heads * architecture.head_dim * visible
    return 2 * architecture.matmul_parameters + attention


def training_flops_per_token(architecture: Architecture, physical_length: int) -> float:
    """FLOPs of forward and backward per token, the numerator of MFU: three times the forward pass.

    LLaMA-3-8B: 6 * 7.505e9 + 6 * 32 * 4096 * (n + 1) = 51.5 GFLOP at n = 8192 and 96.6 GFLOP at 65536. Recomputation
    under activation checkpointing is work, but not model FLOPs, so it lowers MFU. Attention counts the causal half;
    figures that count the full square (Megatron's, torch.utils.flop_counter's) are higher by the same attention term.
    """
    return 3 * forward_flops_per_token(architecture, physical_length)


def _plain(theta: float, head_dim: int) -> RopeScaling:
    return RopeScaling("none", theta, head_dim)


def _llama3(factor: float, head_dim: int) -> RopeScaling:
    """Llama 3.1 and 3.2: extended by Meta from a window of 8192 (meta-llama/llama-models)."""
    return RopeScaling("llama3", 500000.0, head_dim, factor=factor, original_length=8192)


_LLAMA2_7B = Architecture("llama2_7b", 32, 4096, 11008, 32, 32, 128, 32000, 4096, _plain(10000.0, 128), tokenizer="llama2")
_LLAMA3_8B = Architecture("llama3_8b", 32, 4096, 14336, 32, 8, 128, 128256, 8192, _plain(500000.0, 128), tokenizer="llama3")
_LLAMA3_70B = dataclasses.replace(_LLAMA3_8B, name="llama3_70b", layers=80, hidden_size=8192, ffn_size=28672, heads=64)
_LLAMA31 = {"original_length": 131072, "rope": _llama3(8.0, 128)}

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        _LLAMA2_7B,
        dataclasses.replace(_LLAMA2_7B, name="llama2_13b", layers=40, hidden_size=5120, ffn_size=13824, heads=40, kv_heads=40),
        dataclasses.replace(_LLAMA2_7B, name="llama2_70b", layers=80, hidden_size=8192, ffn_size=28672, heads=64, kv_heads=8),
        _LLAMA3_8B,
        _LLAMA3_70B,
        dataclasses.replace(_LLAMA3_8B, name="llama3.1_8b", **_LLAMA31),
        dataclasses.replace(_LLAMA3_70B, name="llama3.1_70b", **_LLAMA31),
        Architecture("llama3.2_1b", 16, 2048, 8192, 32, 8, 64, 128256, 131072, _llama3(32.0, 64), tied=True, tokenizer="llama3"),
        Architecture("llama3.2_3b", 28, 3072, 8192, 24, 8, 128, 128256, 131072, _llama3(32.0, 128), tied=True, tokenizer="llama3"),
        # v0.3: no sliding window, 768 control tokens more than v0.1.
        Architecture("mistral_7b", 32, 4096, 14336, 32, 8, 128, 32768, 32768, _plain(1000000.0, 128), tokenizer="mistral"),
        Architecture("smollm2_135m", 30, 576, 1536, 9, 3, 64, 49152, 8192, _plain(100000.0, 64), tied=True, tokenizer="smollm2"),
        # Small enough to train anywhere: for the tests and for trying a change of the code.
        Architecture("tiny", 2, 64, 128, 4, 2, 16, 512, 128, _plain(10000.0, 16)),
    )
}


def get_architecture(name: str) -> Architecture:
    """Facts by name. Raises UserError, with the closest names, for one that is not listed and for `custom`."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name == CUSTOM:
        raise UserError("model.architecture", "custom has no facts of its own, only config.json has them", "give model.path")
    near = difflib.get_close_matches(name.lower(), ARCHITECTURES, n=3, cutoff=0.5)
    known = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(ARCHITECTURES)}"
    raise UserError("model.architecture", f"unknown architecture {name!r}", f"{known} (or custom, to take config.json's facts)")


def architecture_of_config(config: dict[str, Any], name: str = CUSTOM) -> Architecture:
    """The facts that a checked config.json (`load_hf_config`) states."""
    rope = rope_of_config(config)
    return Architecture(
        name=name,
        layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_size=config["intermediate_size"],
        heads=config["num_attention_heads"],
        kv_heads=key_value_heads_of(config),
        head_dim=head_dim_of(config),
        vocab_size=config["vocab_size"],
        original_length=_original_length(config, rope),
        rope=rope,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def _original_length(config: dict[str, Any], rope: RopeScaling) -> int:
    """The first pre-trained window: of a checkpoint extended by linear or YaRN scaling, the window before that."""
    if rope.type == "linear":
        return round(config["max_position_embeddings"] / rope.factor)
    return rope.original_length if rope.type == "yarn" else config["max_position_embeddings"]


def resolve_architecture(recipe: Recipe, config: dict[str, Any]) -> Architecture:
    """Hold the recipe's architecture and original_length against config.json; returns the facts of the checkpoint.

    A checkpoint that was extended already (linear or YaRN) passes as the architecture it came from; whether the recipe
    may go on from there is for `scaling_for`. Raises UserError naming the first fact that differs.
    """
    found = architecture_of_config(config, recipe.model.architecture)
    place = f"{recipe.model.path}/config.json"
    if recipe.model.architecture != CUSTOM:
        listed = get_architecture(recipe.model.architecture)
        fix = f"choose the right model.path or model.architecture ({CUSTOM} takes config.json's facts)"
        for field in dataclasses.fields(Architecture):
            here, there = getattr(listed, field.name), getattr(found, field.name)
            if field.name in ("name", "tokenizer", "rope", "original_length") or here == there:
                continue
            raise UserError(place, f"{field.name} is {there}, but {listed.name} has {here}", fix)
        extended = found.rope.type in ("linear", "yarn")
        if found.rope != listed.rope and not (extended and found.rope.theta == listed.rope.theta):
            raise UserError(place, f"has {describe(found.rope)}, but {listed.name} has {describe(listed.rope)}", fix)
        found = dataclasses.replace(found, tokenizer=listed.tokenizer)
    if recipe.model.original_length != found.original_length:
        raise UserError(
            f"recipe {recipe.name}: model.original_length",
            f"is {recipe.model.original_length}, but the window that {place} states is {found.original_length}",
            f"set it to {found.original_length}",
        )
    return found
