"""Tables, paired differences and the plot, from results made by hand."""

import copy

import pytest
from matplotlib import pyplot

from endprompt.evaluation import plot as plot_module
from endprompt.evaluation.plot import draw_report
from endprompt.evaluation.report import NOT_PAIRED, build_report, build_tables, render_markdown
from endprompt.evaluation.scoring import CaseScore, summarise


def saved(result: dict) -> dict:
    provenance = {"model": "m", "rope": "r", "seconds": 1.5, "device": "d", "torch": "t", "transformers": "f"}
    return {"settings": {"dtype": "fp32"}, "provenance": provenance, "result": {"fingerprint": "x", **result}}


def distance_result(nll_by_distance: dict[int, list[float]]) -> dict:
    rows = [{"distance": d, **summarise([CaseScore(x, x < 1) for x in nll])} for d, nll in nll_by_distance.items()]
    return saved({"distances": rows})


@pytest.fixture
def results() -> dict:
    buckets = [
        {"start": 0, "end": 256, "tokens": 255, "nll": 3.0, "ppl": 20.0855},
        {"start": 256, "end": 512, "tokens": 256, "nll": 2.0, "ppl": 7.389},
    ]
    cells = [{"length": 512, "depth": d, **summarise([CaseScore(0.5, True), CaseScore(3.5, False)])} for d in (0.0, 0.5)]
    return {
        "distance": {
            "base": distance_result({512: [0.1, 0.3], 8192: [4.0, 6.0], 65024: [8.0, 9.0]}),
            "trained": distance_result({512: [0.2, 0.2], 8192: [0.5, 1.5], 65024: [2.0, 2.5]}),
        },
        "perplexity": {
            n: saved({"windows": 3, "documents": ["a.txt"], "nll": 2.5, "ppl": 12.1825, "buckets": buckets}) for n in ("base", "trained")
        },
        "needle": {n: saved({"cells": cells}) for n in ("base", "trained")},
    }


def test_paired_difference_case_by_case(results):
    (pair,) = build_report(results, 8192, 65536)["paired_beyond_original"]
    # Case means beyond 8192: base (4+8)/2, (6+9)/2; trained (0.5+2)/2, (1.5+2.5)/2. Differences -4.75 and -5.5.
    assert (pair["model"], pair["against"], pair["cases"]) == ("trained", "base", 2)
    assert pair["nll_difference"] == pytest.approx(-5.125)
    standard_error = 0.75 / 2  # |difference of the two| / 2 is s / sqrt(2) for two values
    assert pair["high"] - pair["low"] == pytest.approx(2 * 1.959964 * standard_error)


def test_unpaired_results_are_said_to_be(results):
    results["distance"]["trained"]["result"]["fingerprint"] = "y"
    report = build_report(results, 8192, 65536)
    assert report["paired_beyond_original"] == []
    distance, perplexity, _ = build_tables(report)
    assert NOT_PAIRED in distance.notes and NOT_PAIRED not in perplexity.notes


def test_tables_hold_the_numbers(results):
    distance, perplexity, needle = build_tables(build_report(results, 8192, 65536))
    assert distance.header == ["distance", "base", "trained"]
    assert distance.rows[1] == ["8192", "0.00 [0.00, 0.66]   5.00", "0.50 [0.09, 0.91]   1.00"]
    assert [cell.split() for cell in distance.rows[-1]] == [["mean", ">=", "8192"], ["0.00", "6.75"], ["0.25", "1.62"]]
    assert "2 cases per distance" in distance.title and "trained - base: answer NLL -5.12" in distance.notes[0]
    assert perplexity.rows == [["0..255", "20.09", "20.09"], ["256..511", "7.39", "7.39"], ["all", "12.18", "12.18"]]
    assert needle.rows[1] == ["512", "0.5", *["0.50 [0.09, 0.91]   2.00"] * 2] and needle.rows[2][:2] == ["512", "mean"]
    lines = distance.text().splitlines()
    assert len({len(line) for line in lines[1:6]}) == 1, "columns line up"


def test_markdown_is_a_table_with_provenance(results):
    text = render_markdown(build_report(results, 8192, 65536), "report.png")
    assert "![" in text and "(report.png)" in text
    assert "| distance | base | trained |\n| ---: | ---: | ---: |\n| 512 |" in text
    assert "| trained | needle | m | r | fp32 | 1.5 | d | t | f |" in text


def test_no_far_distance_gives_no_mean(results):
    report = build_report({"distance": results["distance"]}, 10**6, 65536)
    assert report["paired_beyond_original"] == [] and len(build_tables(report)[0].rows) == 3


@pytest.mark.parametrize("tasks, panels", [(["distance"], 2), (["perplexity"], 1), (["distance", "perplexity", "needle"], 4)])
def test_plot_has_a_panel_per_curve_and_every_model(results, tmp_path, monkeypatch, tasks, panels):
    drawn = []
    monkeypatch.setattr(plot_module.pyplot, "close", drawn.append)
    draw_report(build_report({task: results[task] for task in tasks}, 8192, 65536), tmp_path / "report.png")
    (figure,) = drawn
    monkeypatch.undo()
    axes = figure.axes
    assert len(axes) == panels and (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "trained"]
    for axis in axes:
        curves = [line for line in axis.lines if line.get_label() in ("base", "trained")]
        assert [line.get_label() for line in curves] == ["base", "trained"]
        assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in curves}) == 2
    if "distance" in tasks:
        texts = [text.get_text() for text in axes[0].texts]
        assert "original window 8K" in texts and "target 64K" in texts
        base = next(line for line in axes[1].lines if line.get_label() == "base")
        assert list(base.get_xdata()) == [512, 8192, 65024] and list(base.get_ydata()) == pytest.approx([0.2, 5.0, 8.5])
    pyplot.close(figure)


def test_many_models_stay_apart(results, tmp_path):
    models = {f"m{i}": copy.deepcopy(results["distance"]["base"]) for i in range(9)}
    draw_report(build_report({"distance": models}, 8192, 65536), tmp_path / "many.png")
    styles = {tuple(plot_module._style(i)[key] for key in ("color", "marker", "linestyle")) for i in range(9)}
    assert len(styles) == 9
