"""One picture of a recipe's positions: where the tokens go, and which distances attention is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from endprompt.atomic import atomic_file
from endprompt.errors import UserError
from endprompt.positions.coverage import Coverage
from endprompt.positions.inspection import Inspection

_FORMATS = ("png", "pdf", "svg")
_DRAWN_SAMPLES = 6
_BINS = 512


def check_plot_path(path: Path) -> None:
    """Raise UserError for a file name whose ending names no format."""
    if path.suffix.lstrip(".").lower() not in _FORMATS:
        raise UserError(path, "does not end in .png, .pdf or .svg", "choose one of these endings")


def save_plot(inspection: Inspection, path: Path) -> None:
    """Draw the first samples' positions (left) and the pairs at each distance (right) to `path`, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot_path(path)
    recipe, coverage = inspection.recipe, inspection.coverage
    figure = Figure(figsize=(14, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.4])
    _draw_positions(left, inspection)
    _draw_distances(right, inspection)
    figure.suptitle(
        f"{recipe.name}: scheme {recipe.positions.scheme}, {recipe.positions.physical_length:,} physical tokens, "
        f"{recipe.target_length:,} target positions, {coverage.samples:,} sample{'s' if coverage.samples > 1 else ''}"
    )
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=path.suffix.lstrip(".").lower(), dpi=120)


def _draw_positions(axes, inspection: Inspection) -> None:
    drawn = inspection.samples[:_DRAWN_SAMPLES]
    for sample in drawn:
        axes.plot(np.arange(len(sample.position_ids)), sample.position_ids, ".", markersize=4)
    _original_window(axes.axhline, inspection.coverage)
    axes.set(xlabel="physical index of the token (order of the causal mask)", ylabel="position id (rotary phase)")
    axes.set_ylim(-0.02 * inspection.coverage.target_length, 1.02 * inspection.coverage.target_length)
    axes.set_title(f"Where the tokens go: samples 0..{len(drawn) - 1}, one colour each", fontsize="medium")
    _thousands(axes.xaxis, axes.yaxis)


def _draw_distances(axes, inspection: Inspection) -> None:
    coverage = inspection.coverage
    edges = np.unique(np.linspace(0, coverage.target_length, min(_BINS, coverage.target_length) + 1).astype(int))
    mean = np.add.reduceat(coverage.counts, edges[:-1]) / np.diff(edges) / coverage.samples
    axes.stairs(mean, edges, fill=True, alpha=0.8, label="pairs a sample at each distance")
    axes.set_yscale("log")
    axes.set_ylim(bottom=min(0.5, mean[mean > 0].min() / 2))
    _original_window(axes.axvline, coverage)
    if coverage.gaps:
        first, last = max(coverage.gaps, key=lambda gap: gap[1] - gap[0])
        axes.axvspan(first, last + 1, color="tab:red", alpha=0.12, label=gap_words(inspection, first, last))
    axes.set(xlabel="relative distance (query position - key position)", ylabel="pairs a sample, log scale")
    axes.set_title(
        f"{coverage.shown:,} of {coverage.target_length:,} distances shown ({coverage.shown / coverage.target_length:.1%}), "
        f"{coverage.far_pairs / coverage.pairs:.2%} of pairs beyond the original window",
        fontsize="medium",
    )
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)  # below, where it hides nothing
    _thousands(axes.xaxis)


def gap_words(inspection: Inspection, first: int, last: int) -> str:
    """The widest gap, with the arithmetic of paper eq. 8-9 where it holds: one displaced length c, so a = n-c and b = c."""
    measured = f"never shown: {first:,}..{last:,} = {last - first + 1:,} distances"
    if inspection.recipe.positions.scheme != "endprompt":
        return f"widest gap {measured}"
    positions, target = inspection.recipe.positions, inspection.coverage.target_length
    prompts = (inspection.builder.draw_prompt(index) for index in range(len(inspection.samples)))
    displaced = {positions.displaced_length or prompt.length for prompt in prompts}
    if len(displaced) > 1:
        return f"widest gap {measured}"
    b = displaced.pop()
    a = positions.physical_length - b
    return f"{measured}\neq. 8-9: max(a, b)..L-a-b = max({a:,}, {b:,})..{target:,}-{a:,}-{b:,} = {max(a, b):,}..{target - a - b:,}"


def _original_window(line, coverage: Coverage) -> None:
    line(coverage.original_length, color="black", linestyle="--", linewidth=1, label=f"original window of {coverage.original_length:,}")


def _thousands(*axes) -> None:
    from matplotlib.ticker import StrMethodFormatter

    for axis in axes:
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
