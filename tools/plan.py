#!/usr/bin/env python3
"""Plan a recipe before it is queued: memory a GPU by part, fits or not, time, GPU-hours, cost, disk, discount against full length.

    python tools/plan.py recipes/llama3_8b_64k.yaml                              # the fewest nodes it fits on
    python tools/plan.py recipes/llama3_70b_128k.yaml --nodes 8 --engine megatron --plot plan.png
    python tools/plan.py recipes/llama3_70b_128k.yaml --nodes 4 --search         # the best layouts for four nodes
    python tools/plan.py --table --engine megatron recipes/llama3_{8b,70b}_{64k,128k,256k}.yaml    # README's table
    python tools/plan.py --calibration                                           # published H100 rows against predictions

Needs no GPU, no checkpoint and no corpus. Everything is predicted, for H100-80GB.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json

from endprompt.errors import UserError, run_command
from endprompt.planning import Cluster, make_plan
from endprompt.planning.calibration import table
from endprompt.planning.comparison import compare, compare_files, load_and_plan, markdown, recipe_pairs
from endprompt.planning.plan import ENGINES
from endprompt.planning.plot import save_plot
from endprompt.planning.report import as_dict, text
from endprompt.planning.search import search
from endprompt.positions.plot import check_plot_path
from endprompt.recipe import Recipe


def main() -> None:
    arguments = parse_arguments()
    cluster = Cluster(arguments.nodes or 1, arguments.gpus_per_node)
    if arguments.calibration:
        print(table())
        return
    if arguments.table:
        files = recipe_pairs(arguments.recipes)
        found = [compare_files(file, arguments.overrides, arguments.engine, cluster, arguments.nodes) for file in files]
        print(markdown(found))
        return
    file = arguments.recipes[0]
    recipe, cluster = load_and_plan(file, arguments.overrides, arguments.engine, cluster, arguments.nodes)
    try:
        proposals = search(recipe, arguments.engine, cluster) if arguments.search else None
        plan = proposals[0].plan if proposals else make_plan(recipe, arguments.engine, cluster)
    except UserError as error:
        where = error.where.removeprefix("recipe: ")
        if where.split(".")[0] not in Recipe.model_fields:
            raise
        raise UserError(f"{file}: {where}", error.problem, f"{error.fix}, or add --search") from error  # a field: name its file too
    found = compare(plan)
    if arguments.plot:
        save_plot(found, arguments.plot)
    show = (lambda *parts: json.dumps(as_dict(*parts))) if arguments.json else text
    print(show(found, arguments.price_per_gpu_hour, proposals))
    if arguments.plot and not arguments.json:
        print(f"plot: {arguments.plot}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipes", nargs="*", type=Path, metavar="RECIPE", help="recipe in YAML; several with --table")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes (default: the fewest of 1, 2, 4, ... that the recipe fits on)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--engine", choices=ENGINES, default="deepspeed", help="default deepspeed")
    parser.add_argument("--search", action="store_true", help="plan the fastest layout that fits, and list the next ones")
    parser.add_argument("--price-per-gpu-hour", type=float, metavar="X", help="in any currency, for the cost of the run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and GPU-hours to FILE (.png, .pdf or .svg)")
    parser.add_argument("--table", action="store_true", help="markdown: each RECIPE against NAME_full.yaml beside it")
    parser.add_argument("--calibration", action="store_true", help="published H100 throughput against predictions, row by row")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE",
        help="override one field of the recipe; may be repeated",
    )  # fmt: skip
    arguments = parser.parse_args()
    for name in ("nodes", "gpus_per_node", "price_per_gpu_hour"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')}", f"is {value}", "give a number above 0")
    if not arguments.calibration and not arguments.recipes:
        raise UserError("RECIPE", "is missing", "name a recipe, for instance recipes/llama3_8b_64k.yaml")
    if len(arguments.recipes) > 1 and not arguments.table:
        raise UserError("RECIPE", f"{len(arguments.recipes)} are named", "plan one at a time, or add --table")
    if arguments.plot:
        check_plot_path(arguments.plot)
    return arguments


if __name__ == "__main__":
    run_command(main)
