"""One picture of a report: accuracy and answer NLL against distance, perplexity by position, needle accuracy."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display on a cluster node
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from endprompt.atomic import atomic_file
from endprompt.evaluation.scoring import Z95

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with any colour vision; markers and dashes repeat the distinction for print."""
MARKERS, DASHES = "osD^vPX", ("-", "--", "-.", ":")


def draw_report(report: dict, path: Path) -> None:
    """Write the picture of `report.build_report`'s result to `path` (PNG), atomically. One panel per curve there is."""
    panels = [panel for task in report["results"] for panel in _PANELS[task]]
    rows = 2 if len(panels) > 3 else 1
    columns = len(panels) // rows
    figure, axes = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 4.3 * rows + 0.3), layout="constrained", squeeze=False)
    try:
        for axis, panel in zip(axes.flat, panels, strict=True):
            panel(axis, report)
            axis.grid(True, color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, fontsize=11)
        with atomic_file(path, "wb") as file:
            figure.savefig(file, format="png", dpi=130)
    finally:
        pyplot.close(figure)


def _style(index: int) -> dict:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "linewidth": 1.8,
        "markersize": 6,
    }


def _tokens(value: float, _=None) -> str:
    """8192 as 8K, as people write context lengths."""
    return f"{value / 1024:g}K" if value >= 1024 and value % 512 == 0 else f"{value:g}"


def _length_axis(axis: Axes, report: dict, first: int, last: int, label: str) -> None:
    """Logarithmic token axis in powers of two, the original window shaded, the target marked."""
    axis.set_xscale("log", base=2)
    axis.set_xlim(first / 1.15, last * 1.25)
    ticks = [2**k for k in range(4, 31) if first / 1.15 <= 2**k <= last * 1.25]
    axis.xaxis.set_major_locator(FixedLocator(ticks if len(ticks) < 9 else ticks[len(ticks) % 2 :: 2]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(_tokens))
    axis.set_xlabel(label)
    original, target = report["original_length"], report["target_length"]
    top = {"transform": axis.get_xaxis_transform(), "va": "bottom", "fontsize": 9, "color": "#555555"}
    if original > first:
        axis.axvspan(first / 1.15, min(original, last * 1.25), color="#eeeeee", zorder=0)
        axis.text(first / 1.1, 1.01, f"original window {_tokens(original)}", ha="left", **top)
    if target <= last * 1.25:
        axis.axvline(target, color="#555555", linewidth=1, linestyle=(0, (2, 2)))
        axis.text(target, 1.01, f"target {_tokens(target)}", ha="right" if original > first else "center", **top)


def _distance_curve(axis: Axes, report: dict, value: str, spread) -> None:
    by_model = report["results"]["distance"]
    for index, (name, saved) in enumerate(by_model.items()):
        rows = saved["result"]["distances"]
        x, style = [row["distance"] for row in rows], _style(index)
        low, high = zip(*(spread(row) for row in rows), strict=True)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        axis.plot(x, [row[value] for row in rows], label=name, **style)
    _length_axis(axis, report, x[0], x[-1], "assigned distance to the answer (tokens)")


def _accuracy(axis: Axes, report: dict) -> None:
    _distance_curve(axis, report, "accuracy", lambda row: (row["accuracy_low"], row["accuracy_high"]))
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("accuracy (band: 95 % interval)")
    axis.set_title("Distance probe: accuracy", pad=22)


def _nll(axis: Axes, report: dict) -> None:
    def spread(row: dict) -> tuple[float, float]:
        half = Z95 * (row["nll_standard_error"] or 0.0)
        return row["nll"] - half, row["nll"] + half

    _distance_curve(axis, report, "nll", spread)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("answer NLL, nats per token (band: 95 % interval)")
    axis.set_title("Distance probe: answer NLL", pad=22)


def _perplexity(axis: Axes, report: dict) -> None:
    for index, (name, saved) in enumerate(report["results"]["perplexity"].items()):
        buckets = saved["result"]["buckets"]
        # Geometric middle of a bucket; the first starts at 0 and is drawn at half its end.
        x = [(b["start"] * b["end"]) ** 0.5 if b["start"] else b["end"] / 2 for b in buckets]
        axis.plot(x, [b["ppl"] for b in buckets], label=name, **_style(index))
    _length_axis(axis, report, round(x[0]), buckets[-1]["end"], "position in the window (tokens)")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel("perplexity")
    axis.set_title("Perplexity by position", pad=22)


def _needle(axis: Axes, report: dict) -> None:
    """By length, averaged over depths, when there are several lengths; else by depth."""
    by_model = report["results"]["needle"]
    lengths = sorted({row["length"] for row in next(iter(by_model.values()))["result"]["cells"]})
    for index, (name, saved) in enumerate(by_model.items()):
        cells = saved["result"]["cells"]
        if len(lengths) > 1:
            groups = [[row["accuracy"] for row in cells if row["length"] == length] for length in lengths]
            axis.plot(lengths, [sum(group) / len(group) for group in groups], label=name, **_style(index))
        else:
            axis.plot([row["depth"] for row in cells], [row["accuracy"] for row in cells], label=name, **_style(index))
    if len(lengths) > 1:
        _length_axis(axis, report, lengths[0], lengths[-1], "physical length (tokens)")
    else:
        axis.set_xlabel("depth of the fact (0 start, 1 end)")
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("accuracy")
    axis.set_title("Needle" + ("" if len(lengths) > 1 else f", {_tokens(lengths[0])} physical tokens"), pad=22)


_PANELS = {"distance": (_accuracy, _nll), "perplexity": (_perplexity,), "needle": (_needle,)}
