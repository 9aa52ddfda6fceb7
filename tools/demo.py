#!/usr/bin/env python3
"""The main job on a real checkpoint, end to end: SmolLM2-135M-Instruct from 8K to 64K positions, before and after.

    make demo            # or: python tools/demo.py [--recipe recipes/demo.yaml] [--output runs/demo]

Fetches the model and public-domain novels, prepares data, trains with EndPrompt under DeepSpeed ZeRO-3 (2 CPU ranks, or
the GPUs of this machine), exports, and evaluates base / interpolation without training / trained. Every stage is an
ordinary command of this repository, is echoed, and is skipped when a run before has finished it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from endprompt.commands import ROOT, run_step
from endprompt.errors import UserError, run_command
from endprompt.recipe import Recipe, load_recipe

HELD_OUT = ("moby-dick", "austen-emma", "king-james-bible-new-testament")
"""The evaluation reads the first of these that could be fetched, and training never sees it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--recipe", default=str(ROOT / "recipes/demo.yaml"))
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    output, started = arguments.output, time.monotonic()
    here = [f"output.directory={output / 'training'}", f"data.train.0.path={output / 'data/texts'}"]
    recipe = load_recipe(arguments.recipe, here)

    stage(1, "fetch SmolLM2-135M-Instruct and the novels (100 MB)", "1 minute")
    tool("fetch_assets", "--model", "--text", "--output", "assets")
    texts = {path.stem: str(path) for path in sorted(Path("assets/text").glob("*.txt"))}
    held_out = next((name for name in HELD_OUT if name in texts), None)
    if held_out is None or len(texts) < 2:
        raise UserError(
            "assets/text", "holds too few texts to train on one and evaluate on another", "see above what could not be fetched and why"
        )
    stage(2, "turn the texts into an indexed dataset", "half a minute")
    training_texts = [path for name, path in texts.items() if name != held_out]
    options = ["--tokenizer", recipe.model.path, "--output", recipe.data.train[0].path, "--workers", "2"]
    names = f"$(ls assets/text/*.txt | grep -v {held_out})"
    tool("prepare_data", "--input", *training_texts, *options, shown=f"python tools/prepare_data.py --input {names} {shlex.join(options)}")
    stage(3, "write the same interpolation without training, for comparison", "seconds")
    from endprompt.training.hardware import fast_precision  # imports torch: not before the fetching has begun
    from endprompt.zero3.export import ensure_untrained

    precision = recipe.training.precision
    if precision == "bf16" and fast_precision() == "fp32":
        precision = "fp32"
        print("this CPU multiplies no bf16: training and evaluation run in fp32 (training.precision=fp32)", flush=True)
        here.append("training.precision=fp32")
    untrained = output / "untrained"
    ensure_untrained(recipe, untrained)
    stage(4, f"train {recipe.steps} steps of {recipe.tokens_per_step} tokens and export", "8 minutes on 2 cores, seconds on a GPU")
    run_step(
        [sys.executable, str(ROOT / "ds_train.py"), "--recipe", arguments.recipe,
         *(word for override in here for word in ("--set", override)), "--nproc-per-node", str(processes(recipe))], what="training",
    )  # fmt: skip
    stage(5, "evaluate base, untrained and trained", "8 minutes on 2 cores")
    trained = output / "training" / "export"
    models = [f"base={recipe.model.path}", f"untrained={untrained}", f"trained={trained}"]
    tool(
        "evaluate", *(word for model in models for word in ("--model", model)), "--tasks", "distance,perplexity", "--cases", "24",
        "--length", "12288", "--windows", "1", "--bucket", "2048", "--text", texts[held_out], "--output", str(output / "evaluation"),
        "--dtype", precision,
    )  # fmt: skip
    print(f"\ntrained checkpoint: {trained}\nfinished in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)


def stage(number: int, what: str, duration: str) -> None:
    print(f"\n== {number}/5  {what} (about {duration}; at once when done before)", flush=True)


def tool(name: str, *arguments: str, shown: str | None = None) -> None:
    run_step([sys.executable, str(ROOT / "tools" / f"{name}.py"), *arguments], what=name, shown=shown)


def processes(recipe: Recipe) -> int:
    """One rank per GPU as far as the batch divides, two on a CPU."""
    import torch

    available = torch.cuda.device_count() or 2
    batch = recipe.training.global_batch_size // recipe.training.micro_batch_size
    return max(n for n in range(1, available + 1) if batch % n == 0)


if __name__ == "__main__":
    run_command(main)
