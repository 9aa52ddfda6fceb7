#!/usr/bin/env python3
"""Prove that two checkpoints, Hugging Face folders or Megatron checkpoints, hold the same model.

    python tools/verify_checkpoint.py checkpoints/Meta-Llama-3-8B checkpoints/llama3_8b_megatron

Compares metadata, every tensor bit by bit in both formats, digests, and fp32 logits at near and far positions, one layer in
memory at a time. Exit code 0: the same model. 1: not, and the first difference of each kind is named. 2: bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.errors import UserError, run_command

SHOWN = 5


def main() -> int:
    from endprompt.atomic import write_json
    from endprompt.checkpoint.verification import verify
    from endprompt.checkpoint.verify import open_side
    from endprompt.recipe import load_recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("a", type=Path, metavar="A", help="Hugging Face folder, Megatron checkpoint or run folder")
    parser.add_argument("b", type=Path, metavar="B", help="another one")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of a run folder (default: the newest)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="original Hugging Face folder, for checkpoints of Megatron-LM")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="recipe it was trained with, for checkpoints of Megatron-LM")
    parser.add_argument("--positions", metavar="P,P,...", help="positions of the logits (default: four runs from 0 to the end)")
    parser.add_argument("--cast", action="store_true", help="where dtypes differ compare the numbers in the narrower one")
    parser.add_argument("--tensors-only", action="store_true", help="compare tensors only, not metadata and logits")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write everything as JSON")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    given = {"step": arguments.step, "hf_config": arguments.hf_config, "recipe": recipe}
    sides = [open_side(path, **given) for path in (arguments.a, arguments.b)]
    report = verify(*sides, cast=arguments.cast, tensors_only=arguments.tensors_only, positions=parse_positions(arguments.positions))
    for name, differences in report["checks"].items():
        print(f"{name}: {'the same' if not differences else f'{len(differences)} differences'}")
        for line in differences[:SHOWN]:
            print(f"  {line}")
    facts = report["facts"]
    print(f"{facts['tensors']} tensors, weights {facts['weights_digest_a']} and {facts['weights_digest_b']}")
    if "logit_worst_relative_error" in facts:
        print(f"worst relative error of the logits {facts['logit_worst_relative_error']:g} at {len(facts['logit_positions'])} positions")
    if arguments.report:
        write_json(arguments.report, report)
    return 0 if report["same"] else 1


def parse_positions(text: str | None):
    """int64 tensor of rising positions. Raises UserError."""
    import torch

    if text is None:
        return None
    try:
        positions = [int(part) for part in text.split(",")]
    except ValueError:
        positions = []
    if not positions or positions != sorted(set(positions)) or not 0 <= positions[0] <= positions[-1] < 2**24:
        raise UserError(f"--positions {text}", "are not rising whole numbers from 0 to 16777215", "write for instance 0,1,2,65534,65535")
    return torch.tensor(positions)


if __name__ == "__main__":
    run_command(main)
