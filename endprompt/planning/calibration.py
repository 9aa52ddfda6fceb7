"""The efficiencies of a time prediction, fitted to the calibration rows, and its error on the rows that were held out.

A step's seconds are linear in 1/gemm, 1/attention and the exposed share of communication (`speed.Seconds`), so the fit that
makes the relative error least is a linear least-squares problem: no search, no starting point, the same numbers every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from endprompt.planning.cluster import Cluster
from endprompt.planning.published import CALIBRATION, HELD_OUT, Row, rows
from endprompt.planning.speed import Efficiencies, Seconds, megatron_seconds, zero3_seconds

_UNKNOWNS = {
    "fsdp": ("bf16", "communication"),
    "mpt": ("bf16", "triton", "communication"),
    "megatron": ("bf16", "fp8", "flash"),
}
"""What each family's calibration rows determine. None of FSDP's is long enough for attention: Megatron's efficiency is assumed."""

OURS = {"deepspeed": ("fsdp", "bf16", "flash"), "megatron": ("megatron", "bf16", "flash")}
"""Family, precision and attention kernel of this repository's engines."""


@dataclass(frozen=True)
class Checked:
    """A row and what the planner says for it. error: predicted over published throughput, minus 1."""

    row: Row
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.row.tokens_per_second_per_gpu - 1


@cache
def fitted() -> dict[str, dict[str, float]]:
    """By family: 1/efficiency of each precision and kernel, and the exposed share of communication."""
    return {family: _fit(family) for family in _UNKNOWNS}


def efficiencies(engine: str) -> Efficiencies:
    """Of this repository's engine `deepspeed` or `megatron`."""
    return _efficiencies(*OURS[engine])


@cache
def checked(split: str | None = None) -> tuple[Checked, ...]:
    """Every row of a split (of the table when None) with its prediction."""
    found = []
    for row in rows():
        if split in (None, row.split):
            seconds = _seconds(row).total(_efficiencies(row.family, row.precision, row.attention, row.card.watts))
            found.append(Checked(row, row.global_batch * row.length / row.gpus / seconds))
    return tuple(found)


def errors(split: str, family: str) -> dict[str, float]:
    """Rows, median and worst relative error, and the share of rows within 15 %, of one family and split."""
    sizes = sorted(abs(check.error) for check in checked(split) if check.row.family == family)
    within = sum(size <= 0.15 for size in sizes)
    return {"rows": len(sizes), "median": float(np.median(sizes)), "worst": sizes[-1], "within_15_percent": within}


def table() -> str:
    """Every row: published against predicted tokens/s of a GPU, split and error; then a summary of each family and split."""
    lines = [f"{'row':<42} {'split':<12} {'published':>10} {'predicted':>10} {'error':>7}"]
    for check in checked():
        row = check.row
        lines.append(f"{row.id:<42} {row.split:<12} {row.tokens_per_second_per_gpu:>10,.0f} {check.predicted:>10,.0f} {check.error:>+7.1%}")
    lines.append("")
    for family in _UNKNOWNS:
        for split in (CALIBRATION, HELD_OUT):
            found = errors(split, family)
            lines.append(
                f"{family:<9} {split:<12} {found['within_15_percent']} of {found['rows']} rows within 15 %, "
                f"median {found['median']:.1%}, worst {found['worst']:.1%}"
            )
        values = fitted()[family]
        shown = [f"{name} {value if name == 'communication' else 1 / value:.3f}" for name, value in values.items()]
        lines.append(f"{family:<9} fitted       {', '.join(shown)}")
    return "\n".join(lines)


@cache
def slowdown(watts: int) -> float:
    """Times as long as at 700 W that a card limited to `watts` takes for arithmetic, by the calibration row of such a card."""
    if watts == 700:
        return 1.0
    row = next(row for row in rows() if row.card.watts == watts and row.split == CALIBRATION)
    seconds, full = _seconds(row), _efficiencies(row.family, row.precision, row.attention)
    return (_published_seconds(row) - seconds.fixed - seconds.communication * full.communication) / (
        seconds.gemm / full.gemm + seconds.attention / full.attention
    )


def _efficiencies(family: str, precision: str, attention: str, watts: int = 700) -> Efficiencies:
    values, stock = fitted()[family], fitted()["megatron"]  # what a family's own rows leave open comes from Megatron's
    if precision in values:
        gemm = values[precision]
    else:  # fp8 is faster than bf16 by Megatron's ratio
        gemm = values["bf16"] * stock["fp8"] / stock["bf16"]
    slower = slowdown(watts)
    return Efficiencies(1 / (gemm * slower), 1 / (values.get(attention, stock["flash"]) * slower), values.get("communication", 1.0))


def _fit(family: str) -> dict[str, float]:
    """From the calibration rows of 700 W cards."""
    unknowns, lines, targets = _UNKNOWNS[family], [], []
    known = {} if family == "megatron" else {"flash": _fit("megatron")["flash"]}
    for row in rows():
        if row.family == family and row.split == CALIBRATION and row.card.watts == 700:
            seconds, published = _seconds(row), _published_seconds(row)
            coefficients = {row.precision: seconds.gemm, row.attention: seconds.attention, "communication": seconds.communication}
            lines.append([coefficients.get(name, 0.0) / published for name in unknowns])
            given = seconds.fixed + sum(value * coefficients.get(name, 0.0) for name, value in known.items())
            targets.append(1 - given / published)
    solution, *_ = np.linalg.lstsq(np.array(lines), np.array(targets), rcond=None)
    return dict(zip(unknowns, solution.tolist(), strict=True))


def _published_seconds(row: Row) -> float:
    return row.global_batch * row.length / (row.gpus * row.tokens_per_second_per_gpu)


def _seconds(row: Row) -> Seconds:
    per_node = min(8, row.gpus)
    cluster = Cluster(row.gpus // per_node, per_node, network=row.network / 8 * 1e9, hbm=row.card.hbm)
    arguments = (row.architecture, row.length, row.micro_batch, row.micro_steps, row.recompute, cluster)
    if row.family != "megatron":
        return zero3_seconds(*arguments, layers=row.layers, gradient_bytes=row.gradient_bytes, sharded=row.sharded, context=row.context)
    data = row.gpus // (row.tensor * row.pipeline * row.context)
    layout = {"tensor": row.tensor, "pipeline": row.pipeline, "virtual": row.virtual, "context": row.context, "data": data}
    return megatron_seconds(*arguments, **layout, tensor_overlap=True)  # NeMo's recipes overlap tensor-parallel messages
