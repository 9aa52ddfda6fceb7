"""Rotary frequencies of every supported context extension, as one formula.

A rotary embedding turns pair j of a head by the angle m * inv_freq[j] at position m, and multiplies cos and sin of
queries and keys by an attention factor. With f_j = theta^(-2j/D) and D = head_dim (j = 0 .. D/2 - 1), s = factor and
O = original_length:

| type   | inv_freq                                                                | source                             |
|--------|-------------------------------------------------------------------------|------------------------------------|
| none   | f_j                                                                     | RoFormer, arXiv 2104.09864         |
| linear | f_j / s  (position interpolation)                                       | arXiv 2306.15595                   |
| ntk    | f_j with theta * s^(D/(D-2))                                            | "NTK-aware scaled RoPE" (bloc97)   |
| yarn   | (1 - m_j) f_j/s + m_j f_j, m_j = 1 - clip((j - lo)/(hi - lo), 0, 1)      | arXiv 2309.00071                   |
| llama3 | the same mix, m_j = clip((O f_j/2pi - low)/(high - low), 0, 1)           | meta-llama/llama-models            |

so each of them is a weight m_j in [0, 1] on the untouched frequency (`_kept`), and llama3 may further divide every
frequency by `interpolation` to reach beyond the window that a Llama-3.1 checkpoint has already.
Tables are made in float64 and rounded once to fp32. At position 131071 that leaves a phase error of at most 0.004 rad
(theta 10000 to 1000000); transformers' own fp32 powers are up to 3e-7 away from it.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Literal

import torch

from endprompt.errors import UserError

if TYPE_CHECKING:
    from endprompt.recipe.schema import Recipe

RopeType = Literal["none", "linear", "ntk", "yarn", "llama3"]


@dataclass(frozen=True)
class RopeScaling:
    """A rotary embedding. Fields that `type` does not use keep their defaults, so equal tables compare equal.

    theta: base before any scaling. head_dim: D. factor: s >= 1. original_length: O in tokens (yarn, llama3).
    beta_fast, beta_slow: rotations within O above which a frequency is kept, below which it is divided by s (yarn).
    attention_factor: yarn's factor on cos and sin; None becomes 0.1 ln(s) + 1 (its section 3.4).
    low_freq_factor, high_freq_factor: the same two limits for llama3. interpolation: see the module's text.
    """

    type: RopeType
    theta: float
    head_dim: int
    factor: float = 1.0
    original_length: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    interpolation: float = 1.0

    def __post_init__(self):
        """Bring equal tables to equal fields. Raises ValueError for numbers that make no table."""
        used = _USED[self.type]
        for name in _DEFAULTS.keys() - used:
            object.__setattr__(self, name, _DEFAULTS[name])
        if self.head_dim % 2 or self.head_dim < 4:
            raise ValueError(f"head_dim must be even and at least 4, found {self.head_dim}")
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, found {self.factor:g}")
        if "original_length" in used and not self.original_length:
            raise ValueError(f"{self.type} needs original_length")
        if self.beta_fast <= self.beta_slow:
            raise ValueError(f"beta_fast {self.beta_fast:g} must be above beta_slow {self.beta_slow:g}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor {self.high_freq_factor:g} must be above low_freq_factor {self.low_freq_factor:g}")
        if "attention_factor" in used and self.attention_factor is None:
            object.__setattr__(self, "attention_factor", 0.1 * math.log(self.factor) + 1.0)


_DEFAULTS = {field.name: field.default for field in fields(RopeScaling) if field.default is not MISSING}
_USED: dict[str, set[str]] = {
    "none": set(),
    "linear": {"factor"},
    "ntk": {"factor"},
    "yarn": {"factor", "original_length", "beta_fast", "beta_slow", "attention_factor"},
    "llama3": {"factor", "original_length", "low_freq_factor", "high_freq_factor", "interpolation"},
}


def inverse_frequencies(scaling: RopeScaling) -> torch.Tensor:
    """fp32 [head_dim // 2] on the CPU, radians per position; independent of the positions that will be used."""
    pairs = torch.arange(scaling.head_dim // 2, dtype=torch.float64)
    frequencies = effective_theta(scaling) ** (-2 * pairs / scaling.head_dim)
    kept = _kept(scaling, pairs, frequencies)
    table = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    return (table / scaling.interpolation).float()


def effective_theta(scaling: RopeScaling) -> float:
    """The base that goes into f_j: theta, or NTK's enlarged one."""
    if scaling.type != "ntk":
        return scaling.theta
    return scaling.theta * scaling.factor ** (scaling.head_dim / (scaling.head_dim - 2))


def attention_factor(scaling: RopeScaling) -> float:
    """Multiplies cos and sin of both queries and keys, hence logits by its square. 1 except for yarn."""
    return scaling.attention_factor if scaling.attention_factor is not None else 1.0


def _kept(scaling: RopeScaling, pairs: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """m_j: how much of the untouched frequency stays; 1 keeps it, 0 divides it by the factor. float64 [head_dim // 2]."""
    if scaling.type == "linear":
        return torch.zeros_like(frequencies)
    if scaling.type == "yarn":
        low, high = yarn_ramp(scaling)
        return 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    if scaling.type == "llama3":
        rotations = scaling.original_length * frequencies / (2 * math.pi)
        return ((rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return torch.ones_like(frequencies)


def yarn_ramp(scaling: RopeScaling) -> tuple[float, float]:
    """(lo, hi): pair indices between which YaRN blends, rounded outwards and clamped to [0, D - 1] as its authors do."""

    def pair_with(rotations: float) -> float:
        """Index of the pair that turns `rotations` times within the original window."""
        return scaling.head_dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(scaling.theta))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), scaling.head_dim - 1)
    return low, high if high != low else high + 0.001  # the reference code's guard against a division by zero


def scaling_for(recipe: Recipe, checkpoint: RopeScaling) -> RopeScaling:
    """The rotary embedding that a run trains with and exports.

    checkpoint: the model's own (`rope_of_config`); it supplies head_dim, and theta unless the recipe sets one.
    Raises UserError where the recipe would drop a scaling that the checkpoint was trained with.
    """
    rope = recipe.rope
    try:
        scaling = RopeScaling(
            type=rope.type,
            theta=rope.theta or checkpoint.theta,
            head_dim=checkpoint.head_dim,
            factor=recipe.rope_factor,
            original_length=rope.original_length or recipe.model.original_length,
            beta_fast=rope.beta_fast,
            beta_slow=rope.beta_slow,
            attention_factor=rope.attention_factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            interpolation=rope.interpolation,
        )
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: rope", str(error), "correct it in the recipe") from None
    if checkpoint.type != "none":
        _check_continues(recipe, scaling, checkpoint)
    return scaling


def _check_continues(recipe: Recipe, scaling: RopeScaling, checkpoint: RopeScaling) -> None:
    """A scaled checkpoint is extended by the same kind of scaling: factors count from the *first* pre-trained window.

    Linear or YaRN may grow their factor (64K to 128K: s = 8 to 16, original_length still 8192); llama3 keeps its
    parameters, because Meta's model was trained with them, and grows by `interpolation`.
    """
    where = f"recipe {recipe.name}: rope"
    own = f"the checkpoint was trained with {describe(checkpoint)}"
    if scaling.type != checkpoint.type:
        if checkpoint.type == "llama3":
            more = max(1.0, recipe.target_length / recipe.model.original_length)
            fix = (
                f"use rope.type: llama3 with factor: {checkpoint.factor:g}, original_length: {checkpoint.original_length} "
                f"and rope.interpolation: {more:g} (target_length / model.original_length)"
            )
        else:
            fix = f"use rope.type: {checkpoint.type}, with a factor counted from the first pre-trained window"
        raise UserError(f"{where}.type", f"{scaling.type} would drop a scaling, {own}", fix)
    grows = "interpolation" if scaling.type == "llama3" else "factor"
    for name in sorted(_USED[scaling.type] - {grows, "attention_factor"}):
        mine, theirs = getattr(scaling, name), getattr(checkpoint, name)
        if mine != theirs:
            raise UserError(f"{where}.{name}", f"{mine:g} disagrees, {own}", f"set rope.{name}: {theirs:g}")
    if getattr(scaling, grows) < getattr(checkpoint, grows):
        raise UserError(
            f"{where}.{grows}", f"{getattr(scaling, grows):g} is smaller than before, {own}", f"set at least {getattr(checkpoint, grows):g}"
        )


def describe(scaling: RopeScaling) -> str:
    """One line for messages and model cards, for instance `linear rope (theta 500000, factor 8)`."""
    told = [name for name, default in _DEFAULTS.items() if getattr(scaling, name) != default]
    facts = [f"theta {scaling.theta:g}"] + [f"{name} {getattr(scaling, name):g}" for name in told]
    return f"{'plain' if scaling.type == 'none' else scaling.type} rope ({', '.join(facts)})"
