#!/usr/bin/env python3
"""Convert a Megatron-Core checkpoint (torch_dist) to a Hugging Face folder with config, tokenizer and model card.

    python tools/megatron_to_hf.py --input runs/llama3_8b_64k --output exports/llama3_8b_64k
    python tools/megatron_to_hf.py --input megatron_lm_run --step 2000 --output exports/x \
        --hf-config checkpoints/Meta-Llama-3-8B --recipe recipes/llama3_8b_64k.yaml

--input is a checkpoint, a run folder of this project or Megatron-LM's save folder (then the newest checkpoint, or --step).
Checkpoints of this project say themselves which model they are; for others --hf-config names the original Hugging Face
folder and --recipe what it was trained with, from which RoPE and window of the export come.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.errors import UserError, run_command


def main() -> None:
    from endprompt.checkpoint.command import add_common_arguments, convert
    from endprompt.checkpoint.to_huggingface import plan_to_huggingface
    from endprompt.recipe import load_recipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_common_arguments(parser, "Megatron checkpoint, run folder, or Megatron-LM's save folder")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint of the folder (default: the newest)")
    parser.add_argument("--hf-config", type=Path, metavar="DIR", help="original Hugging Face folder (config.json, tokenizer)")
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="recipe it was trained with: RoPE and target length")
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE", help="override a field of --recipe")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="dtype to write (default: the recipe's, else as stored)")
    parser.add_argument("--shard-gb", type=float, metavar="GB", help="largest shard (default: the source's shards, else 5)")
    arguments = parser.parse_args()
    if arguments.overrides and not arguments.recipe:
        raise UserError("--set", "overrides a field of --recipe, which is not given", "give --recipe too")
    recipe = load_recipe(arguments.recipe, arguments.overrides) if arguments.recipe else None
    convert(
        arguments,
        lambda: plan_to_huggingface(
            arguments.input, arguments.output, step=arguments.step, hf_config=arguments.hf_config, recipe=recipe,
            dtype=arguments.dtype, shard_gb=arguments.shard_gb,
        ),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
