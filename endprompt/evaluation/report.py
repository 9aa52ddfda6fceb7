"""Results of several models side by side: tables in plain text and Markdown, and one JSON with everything and its provenance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from endprompt.evaluation.scoring import Z95

NOT_PAIRED = "The models did not read the same tokens (their tokenizers differ): compare them with care."


@dataclass
class Table:
    """title: one line; header and rows: cells as text; notes: sentences below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        widths = [max(len(row[i]) for row in [self.header, *self.rows]) for i in range(len(self.header))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [self.header, *self.rows]]
        return "\n".join([self.title, *(f"  {line}" for line in lines), *(f"  {note}" for note in self.notes)])

    def markdown(self) -> str:
        lines = [f"| {' | '.join(row)} |" for row in [self.header, ["---:"] * len(self.header), *self.rows]]
        return "\n".join([f"### {self.title}", "", *lines, *(f"\n{note}" for note in self.notes)])


def build_report(results: dict[str, dict[str, dict]], original_length: int, target_length: int) -> dict:
    """JSON-ready: the saved results by task and model, the two lengths, and paired differences of the distance probe.

    results: what `suite.run_suite` returns.
    """
    return {
        "original_length": original_length,
        "target_length": target_length,
        "paired_beyond_original": paired_differences(results["distance"], original_length) if "distance" in results else [],
        "results": results,
    }


def paired_differences(by_model: dict[str, dict], original_length: int) -> list[dict]:
    """How each later model differs from each earlier one in answer NLL at distances >= original_length.

    The same case is measured on both models, so the difference is taken case by case (mean over distances first: the
    distances of one case are not independent) and its 95 % interval is mean +- 1.96 standard errors over cases.
    Left out where the models read different tokens, fewer than two cases, or no such distance.
    """
    names, pairs = list(by_model), []
    for i, later in enumerate(names):
        for earlier in names[:i]:
            a, b = (_case_means(by_model[n]["result"], original_length) for n in (later, earlier))
            same = by_model[later]["result"]["fingerprint"] == by_model[earlier]["result"]["fingerprint"]
            if not same or len(a) < 2:
                continue
            differences = [x - y for x, y in zip(a, b, strict=True)]
            mean = sum(differences) / len(differences)
            error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
            pairs.append(
                {
                    "model": later,
                    "against": earlier,
                    "cases": len(a),
                    "nll_difference": mean,
                    "low": mean - Z95 * error,
                    "high": mean + Z95 * error,
                }
            )
    return pairs


def _case_means(result: dict, original_length: int) -> list[float]:
    """Mean NLL of each case over the distances >= original_length; empty when there is none."""
    far = [row["case_nll"] for row in result["distances"] if row["distance"] >= original_length]
    return [sum(case) / len(case) for case in zip(*far, strict=True)]


def build_tables(report: dict) -> list[Table]:
    """One table per task, models as columns."""
    makers = {"distance": _distance_table, "perplexity": _perplexity_table, "needle": _needle_table}
    return [makers[task](by_model, report) for task, by_model in report["results"].items()]


def render_markdown(report: dict, plot_name: str) -> str:
    lines = [table.markdown() for table in build_tables(report)]
    return (
        "\n\n".join(["# Evaluation", f"![accuracy and NLL by distance, perplexity by position]({plot_name})", *lines, _provenance(report)])
        + "\n"
    )


def _provenance(report: dict) -> str:
    lines = [
        "### Provenance",
        "",
        "| model | task | checkpoint | rope | dtype | seconds | device | torch | transformers |",
        "|---" * 9 + "|",
    ]
    for task, by_model in report["results"].items():
        for name, saved in by_model.items():
            p = saved["provenance"]
            cells = (
                name,
                task,
                p["model"],
                p["rope"],
                saved["settings"]["dtype"],
                p["seconds"],
                p["device"],
                p["torch"],
                p["transformers"],
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _notes(by_model: dict[str, dict]) -> list[str]:
    return [] if len({saved["result"]["fingerprint"] for saved in by_model.values()}) == 1 else [NOT_PAIRED]


def _distance_table(by_model: dict[str, dict], report: dict) -> Table:
    original = report["original_length"]
    columns = [saved["result"]["distances"] for saved in by_model.values()]
    rows = [[str(first["distance"]), *(_score_cell(column[i]) for column in columns)] for i, first in enumerate(columns[0])]
    far = [[row for row in column if row["distance"] >= original] for column in columns]
    if far[0]:
        means = [(sum(r["accuracy"] for r in column) / len(column), sum(r["nll"] for r in column) / len(column)) for column in far]
        rows.append([f"mean >= {original}", *(f"{accuracy:.2f} {'':11} {nll:6.2f}" for accuracy, nll in means)])
    notes = _notes(by_model)
    for pair in report["paired_beyond_original"]:
        notes.append(
            f"{pair['model']} - {pair['against']}: answer NLL {pair['nll_difference']:+.2f} "
            f"[{pair['low']:+.2f}, {pair['high']:+.2f}] beyond the original window, case by case"
        )
    title = f"Distance probe: accuracy [95 % interval] and answer NLL (nats per token), {columns[0][0]['cases']} cases per distance"
    return Table(title, ["distance", *by_model], rows, notes)


def _score_cell(row: dict) -> str:
    return f"{row['accuracy']:.2f} [{row['accuracy_low']:.2f}, {row['accuracy_high']:.2f}] {row['nll']:6.2f}"


def _perplexity_table(by_model: dict[str, dict], report: dict) -> Table:
    columns = [saved["result"] for saved in by_model.values()]
    rows = [
        [f"{first['start']}..{first['end'] - 1}", *(f"{column['buckets'][i]['ppl']:.2f}" for column in columns)]
        for i, first in enumerate(columns[0]["buckets"])
    ]
    rows.append(["all", *(f"{column['ppl']:.2f}" for column in columns)])
    first, length = columns[0], columns[0]["buckets"][-1]["end"]
    title = f"Perplexity by position: {first['windows']} windows of {length} tokens from {len(first['documents'])} documents"
    return Table(title, ["position", *by_model], rows, _notes(by_model))


def _needle_table(by_model: dict[str, dict], report: dict) -> Table:
    columns = [saved["result"]["cells"] for saved in by_model.values()]
    rows = [
        [str(first["length"]), f"{first['depth']:g}", *(_score_cell(column[i]) for column in columns)] for i, first in enumerate(columns[0])
    ]
    for length in dict.fromkeys(row["length"] for row in columns[0]):
        cells = [[row for row in column if row["length"] == length] for column in columns]
        means = [(sum(r["accuracy"] for r in c) / len(c), sum(r["nll"] for r in c) / len(c)) for c in cells]
        rows.append([str(length), "mean", *(f"{accuracy:.2f} {'':12} {nll:6.2f}" for accuracy, nll in means)])
    title = f"Needle in a real context: accuracy [95 % interval] and answer NLL, {columns[0][0]['cases']} cases per depth"
    return Table(title, ["length", "depth", *by_model], rows, _notes(by_model))
