#!/usr/bin/env python3
"""Show which positions a recipe gives its tokens and which relative distances that covers. Needs no corpus and no model.

    python tools/inspect_positions.py --recipe recipes/llama3_8b_64k.yaml
    python tools/inspect_positions.py --recipe recipes/llama3_8b_64k.yaml --set positions.scheme=pose --samples 200 --plot pose.png

Positions, prompts and loss weights are those of a training run with this recipe; only the text is a stand-in.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json

from endprompt.errors import UserError, run_command
from endprompt.positions.inspection import as_dict, inspect, table
from endprompt.positions.plot import check_plot_path, save_plot
from endprompt.recipe import Recipe, add_recipe_arguments, load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_recipe_arguments(parser)
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="samples to build, from number 0 (default 4)")
    parser.add_argument("--json", action="store_true", help="print JSON: every sample's position_ids and loss_weights, and the coverage")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw positions and distances to FILE (.png, .pdf or .svg)")
    parser.add_argument(
        "--prompt-length", type=int, metavar="N",
        help="tokens of every prompt's words (a recall prompt's cue), in place of the checkpoint's tokenizer",
    )  # fmt: skip
    arguments = parser.parse_args()
    for option, value in (("--samples", arguments.samples), ("--prompt-length", arguments.prompt_length)):
        if value is not None and value < 1:
            raise UserError(option, f"is {value}", "give at least 1")
    if arguments.plot:
        check_plot_path(arguments.plot)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    try:
        inspection = inspect(recipe, arguments.samples, arguments.prompt_length)
    except UserError as error:
        if error.where.split(".")[0] not in Recipe.model_fields:
            raise
        raise UserError(f"{arguments.recipe}: {error.where}", error.problem, error.fix) from error  # a field: name its file too
    if arguments.plot:
        save_plot(inspection, arguments.plot)
    print(json.dumps(as_dict(inspection)) if arguments.json else table(inspection))
    if arguments.plot and not arguments.json:
        print(f"\nplot: {arguments.plot}")


if __name__ == "__main__":
    run_command(main)
