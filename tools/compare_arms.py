#!/usr/bin/env python3
"""Train several position schemes and rope scalings on one recipe and evaluate them side by side.

    python tools/compare_arms.py --recipe recipes/smollm2_135m_64k.yaml --output runs/arms \\
        --schemes endprompt,endprompt_random,pose,short --ropes linear,yarn --text assets/text/moby-dick.txt

Beside the trained arms stand the untouched checkpoint and each rope without training. Restartable: run it again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.machine import describe_machine
from endprompt.commands import ROOT, run_step
from endprompt.errors import UserError, run_command
from endprompt.recipe import add_recipe_arguments
from endprompt.replication.arms import plan_arms, summarise_arm, train_arm, write_summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_recipe_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the arms' runs, the evaluation and summary.json")
    parser.add_argument("--schemes", default="endprompt,endprompt_random,pose,short")
    parser.add_argument("--ropes", default="linear,yarn")
    parser.add_argument("--nproc-per-node", type=int, metavar="N")
    parser.add_argument("--text", nargs="+", required=True, help="held-out documents for the evaluation")
    parser.add_argument("--tasks", default="distance,perplexity,needle")
    parser.add_argument("--evaluate", default="", metavar="OPTIONS", help="more options for tools/evaluate.py, quoted as one word")
    arguments = parser.parse_args()
    missing = [path for path in arguments.text if not Path(path).exists()]
    if missing:
        raise UserError(f"--text {missing[0]}", "no such file", "give plain text files that the training did not see")

    arms = plan_arms(arguments.recipe, arguments.schemes.split(","), arguments.ropes.split(","), arguments.overrides, arguments.output)
    models = [f"base={arms[0][1].model.path}", *export_untrained_ropes(arms, arguments.output)]
    rows = []
    for arm, recipe in arms:
        train_arm(arguments.recipe, arm, arguments.overrides, arguments.nproc_per_node)
        rows.append(summarise_arm(arm, recipe))
        models.append(f"{arm.name}={rows[-1]['export']}")
    named = [word for model in models for word in ("--model", model)]
    evaluate = [
        sys.executable,
        str(ROOT / "tools/evaluate.py"),
        *named,
        "--tasks",
        arguments.tasks,
        "--output",
        str(arguments.output / "evaluation"),
    ]
    run_step([*evaluate, "--text", *arguments.text, *shlex.split(arguments.evaluate)], what="evaluation")
    print("\n" + write_summary(arguments.output / "summary.json", rows, describe_machine(), shlex.join(["python", *sys.argv])))


def export_untrained_ropes(arms, output: Path) -> list[str]:
    """One checkpoint per rope with the base's weights: what the interpolation does by itself."""
    from endprompt.zero3.export import ensure_untrained

    named = {}
    for arm, recipe in arms:
        target = output / f"untrained-{arm.rope}"
        if arm.rope not in named:
            ensure_untrained(recipe, target)
        named[arm.rope] = f"untrained-{arm.rope}={target}"
    return list(named.values())


if __name__ == "__main__":
    run_command(main)
