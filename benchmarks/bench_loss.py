#!/usr/bin/env python3
"""Peak memory and time of the weighted loss against the ordinary Hugging Face loss, forward and backward.

    python benchmarks/bench_loss.py --output benchmarks/results/loss.json

Llama-3's vocabulary (128256), 8192 tokens, hidden size 64 so that logits and not hidden states are measured; bf16, or fp32 on a CPU
that has no bf16 products. Each side runs in a process of its own; memory is the growth of its peak resident set.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from endprompt.errors import run_command

TOKENS, VOCABULARY, HIDDEN = 8192, 128256, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--side", choices=("ours", "ordinary"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(run_side(arguments.side)))
        return
    from benchmarks.machine import describe_machine
    from endprompt.atomic import write_json
    from endprompt.training.hardware import fast_precision

    sides = {side: measure(side) for side in ("ours", "ordinary")}
    result = {
        "what": f"weighted loss, {TOKENS} tokens, vocabulary {VOCABULARY}, {fast_precision()}, forward and backward",
        "machine": describe_machine(),
        **sides,
        "memory_ratio": round(sides["ours"]["peak_mb"] / sides["ordinary"]["peak_mb"], 3),
        "time_ratio": round(sides["ours"]["seconds"] / sides["ordinary"]["seconds"], 3),
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure(side: str) -> dict[str, float]:
    """{"peak_mb", "seconds"} of one side, in a fresh process."""
    run = subprocess.run([sys.executable, __file__, "--side", side], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


def run_side(side: str) -> dict[str, float]:
    import torch

    from endprompt.loss import weighted_next_token_loss
    from endprompt.training.hardware import fast_precision

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[fast_precision()]
    torch.set_num_threads(2)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.1).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    if side == "ours":
        weighted_next_token_loss(hidden, weight, labels, torch.ones(TOKENS)).backward()
    else:  # transformers' ForCausalLMLoss: logits, upcast to fp32, cross-entropy
        torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), labels).backward()
    seconds = time.monotonic() - started
    return {"peak_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1), "seconds": round(seconds, 2)}


if __name__ == "__main__":
    run_command(main)
