"""One picture of a plan: memory of every phase by part against the GPU's, and GPU-hours beside full length."""

from __future__ import annotations

from pathlib import Path

from endprompt.atomic import atomic_file
from endprompt.planning.comparison import Comparison
from endprompt.positions.plot import check_plot_path


def save_plot(found: Comparison, path: Path) -> None:
    """Draw to `path` (.png, .pdf or .svg), atomically. Raises UserError for another ending."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    check_plot_path(path)
    plan = found.plan
    figure = Figure(figsize=(14, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    _draw_memory(left, found)
    _draw_hours(right, found)
    figure.suptitle(f"{plan.recipe.name}, predicted: {plan.engine}, {plan.layout_words}, {plan.cluster.nodes} node(s) of H100-80GB")
    with atomic_file(path, "wb") as file:
        figure.savefig(file, format=path.suffix.lstrip(".").lower(), dpi=120)


def _draw_memory(axes, found: Comparison) -> None:
    from matplotlib import colormaps

    memory, limit = found.plan.memory, found.plan.cluster.memory_gb
    parts = list(dict.fromkeys(part for phase in memory.phases.values() for part, size in phase.items() if size))
    colours = dict(zip(parts, colormaps["tab20"].colors, strict=False))
    names = list(memory.phases)
    for row, name in enumerate(names):
        left = 0.0
        for part, size in memory.phases[name].items():
            if size:
                axes.barh(row, size / 1e9, left=left, color=colours[part], edgecolor="white", linewidth=0.5)
                left += size / 1e9
        axes.text(left + 0.01 * limit, row, f"{left:.1f}", va="center", fontweight="bold" if name == memory.peak_phase else "normal")
    axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    axes.text(limit, len(names) - 0.6, f" {limit:g} GB", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * max(limit, memory.total_gb))
    axes.set(xlabel="GB a GPU (10^9 bytes)", ylabel="phase of a step")
    axes.set_title(f"Memory of the fullest GPU: {memory.total_gb:.1f} GB while in {memory.peak_phase}", fontsize="medium")
    axes.legend(
        [_patch(colours[part]) for part in parts], parts, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=5, frameon=False
    )  # fmt: skip


def _patch(colour):
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _draw_hours(axes, found: Comparison) -> None:
    plan, full = found.plan, found.full
    bars = [(f"{plan.recipe.positions.scheme}\n{plan.recipe.positions.physical_length:,} tokens\na sample", plan.gpu_hours)]
    if full and full is not plan:
        bars.append((f"full length\n{plan.recipe.target_length:,} tokens\na sample", full.gpu_hours))
    for place, (_, hours) in enumerate(bars):
        axes.bar(place, hours, width=0.6, color=("tab:blue", "tab:gray")[place])
        axes.text(place, hours, f"{hours:,.0f}", ha="center", va="bottom")
    axes.set_xticks(range(len(bars)), [name for name, _ in bars])
    axes.set_xlim(-0.7, len(bars) - 0.3)
    axes.set_ylim(0, 1.12 * max(hours for _, hours in bars))
    axes.set(ylabel=f"GPU-hours of {plan.recipe.steps * plan.recipe.tokens_per_step / 1e9:.2f}e9 tokens")
    discount = f"{found.wall_clock:.2f} by time, " if full else "full length fits in no layout here; "
    axes.set_title(f"Discount: {discount}{found.per_token:.2f} by FLOPs a token", fontsize="medium")
