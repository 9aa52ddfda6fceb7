#!/usr/bin/env python3
"""Convert a Hugging Face checkpoint to a Megatron-Core checkpoint (torch_dist) that loads at any parallel layout.

    python tools/hf_to_megatron.py --input checkpoints/Meta-Llama-3-8B --output checkpoints/llama3_8b_megatron

Runs on a login node: no GPU, no process group, less than 1 GB of memory whatever the model. After a kill run the same
command with --resume. The output is there whole or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.errors import run_command


def main() -> None:
    from endprompt.checkpoint.command import add_common_arguments, convert
    from endprompt.checkpoint.to_megatron import plan_to_megatron

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_common_arguments(parser, "Hugging Face folder: config.json and safetensors")
    parser.add_argument("--vocab-multiple", type=int, default=1, metavar="N", help="pad the vocabulary with zeros to a multiple of N")
    parser.add_argument("--megatron-lm", action="store_true", help="lay it out for --load of Megatron-LM's own training script")
    arguments = parser.parse_args()
    options = {"vocabulary_multiple": arguments.vocab_multiple, "megatron_lm": arguments.megatron_lm}
    convert(arguments, lambda: plan_to_megatron(arguments.input, arguments.output, **options))


if __name__ == "__main__":
    run_command(main)
