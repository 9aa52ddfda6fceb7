"""The command line that both engines' entry points have."""

from __future__ import annotations

import argparse

from endprompt.errors import UserError
from endprompt.recipe import add_recipe_arguments


def parse_arguments(description: str) -> argparse.Namespace:
    """recipe, overrides, nproc_per_node, dry_run, world_size. Raises UserError for numbers that make no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add_recipe_arguments(parser)
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="processes to start here (default: one per GPU, or one)")
    parser.add_argument("--dry-run", action="store_true", help="check recipe, checkpoint headers, tokenizer, data and disk; train nothing")
    parser.add_argument("--world-size", type=int, metavar="N", help="with --dry-run: number of ranks to plan for")
    arguments = parser.parse_args()
    for name in ("nproc_per_node", "world_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}", f"is {value}", "give at least 1")
    if arguments.world_size and not arguments.dry_run:
        raise UserError("--world-size", "goes with --dry-run", "start that many processes with --nproc-per-node or torchrun")
    return arguments


def processes_wanted(arguments: argparse.Namespace) -> int:
    """Ranks of this machine: as asked, else one per GPU, else one."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and (arguments.nproc_per_node or 0) > gpus and not arguments.dry_run:
        raise UserError("--nproc-per-node", f"is {arguments.nproc_per_node}, this machine shows {gpus} GPUs", f"give at most {gpus}")
    return arguments.nproc_per_node or max(1, gpus)
