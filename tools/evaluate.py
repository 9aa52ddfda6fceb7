"""Compare checkpoints by distance probe, perplexity by position and physical needle test; tables, JSON and a plot.

    python tools/evaluate.py --model base=checkpoints/base --model extended=runs/a/export --output runs/a/evaluation \
        --tasks distance,perplexity,needle --text novel1.txt novel2.txt

Run the same command again after an interruption: finished (model, task) pairs are kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse

from endprompt.atomic import atomic_file, write_json
from endprompt.errors import run_command


def main() -> None:
    from endprompt.evaluation.command import add_arguments, build_suite
    from endprompt.evaluation.plot import draw_report
    from endprompt.evaluation.report import build_report, build_tables, render_markdown
    from endprompt.evaluation.suite import run_suite

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    suite, original_length, target_length = build_suite(arguments)
    report = build_report(run_suite(suite), original_length, target_length)

    plot = arguments.output / "report.png"
    write_json(arguments.output / "report.json", report)
    draw_report(report, plot)
    with atomic_file(arguments.output / "report.md") as file:
        file.write(render_markdown(report, plot.name))
    print("\n\n".join(table.text() for table in build_tables(report)))
    print(f"\nplot    {plot}\nreport  {arguments.output / 'report.json'}")


if __name__ == "__main__":
    run_command(main)
