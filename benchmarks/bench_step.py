#!/usr/bin/env python3
"""Time a training step of ds_train.py against transformers' Trainer: same model, ZeRO-3 settings, samples and ranks.

    python benchmarks/bench_step.py --output benchmarks/results/step.json

Both run two ranks for a few steps, alternately, `--rounds` times; the first step of a run is warm-up and not counted.
The model has SmolLM2-135M's layer shapes with fewer layers, random weights. Trainer trains on the same tokens with
ordinary positions and its own loss (it knows no loss weights), so its work is the same or less. bf16, or fp32 on a CPU
that has no bf16 products: torch then multiplies number by number, and nothing else would be measured.

On a CPU ds_train.py's launcher gives its ranks an allocator that keeps memory. Trainer is timed as its users start it, and once
more with that allocator, to tell the two parts of the difference apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine
from endprompt.atomic import write_json
from endprompt.errors import run_command
from endprompt.training.hardware import CPU_ALLOCATOR, fast_precision, rank_environment
from endprompt.training.launch import launch

RANKS = 2
SAME_ALLOCATOR = "trainer, same allocator"
SHARED = ("layers", "length", "batch", "steps", "precision")
"""Arguments that a rank of the Trainer's side needs too."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the JSON result")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="samples a step")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 where it is fast")
    parser.add_argument("--trainer-rank", metavar="WORKSPACE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.precision = arguments.precision or fast_precision()
    if arguments.trainer_rank:
        return trainer_rank(Path(arguments.trainer_rank), arguments)
    with tempfile.TemporaryDirectory() as workspace:
        seconds = measure(Path(workspace), arguments)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "what": f"seconds a training step, two ranks, ZeRO-3, {arguments.precision}, activation checkpointing",
        "machine": describe_machine(),
        "settings": {name: getattr(arguments, name) for name in (*SHARED, "rounds")},
        "seconds": {name: [round(t, 3) for t in times] for name, times in seconds.items()},
        "median_seconds": {name: round(t, 3) for name, t in medians.items()},
        "speed_ratio": round(medians["trainer"] / medians["ds_train"], 3),
    }
    if SAME_ALLOCATOR in medians:
        result["speed_ratio_with_the_same_allocator"] = round(medians[SAME_ALLOCATOR] / medians["ds_train"], 3)
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure(workspace: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    make_inputs(workspace, arguments)
    trainers = {"trainer": dict.fromkeys(CPU_ALLOCATOR, "")}  # its environment
    if rank_environment():
        trainers[SAME_ALLOCATOR] = {}
    seconds: dict[str, list[float]] = {"ds_train": [], **{name: [] for name in trainers}}
    for number in range(arguments.rounds):
        run = workspace / f"run{number}"
        command = [
            sys.executable,
            str(ROOT / "ds_train.py"),
            "--recipe",
            str(workspace / "recipe.yaml"),
            "--set",
            f"output.directory={run}",
        ]
        assert launch(RANKS, command) == 0, "ds_train.py failed"
        steps = [json.loads(line)["step_seconds"] for line in (run / "log.jsonl").read_text().splitlines()]
        seconds["ds_train"] += steps[1:]
        own = [f"--{name}={getattr(arguments, name)}" for name in SHARED]
        for name, environment in trainers.items():
            with mock.patch.dict(os.environ, environment):
                assert launch(RANKS, [sys.executable, __file__, f"--trainer-rank={workspace}", *own]) == 0, "Trainer failed"
            seconds[name] += json.loads((workspace / "trainer.json").read_text())[1:]
    return seconds


def make_inputs(workspace: Path, arguments: argparse.Namespace) -> None:
    """A random model of SmolLM2's layer shapes with a small tokenizer, random tokens, and a recipe over them."""
    import numpy as np
    import yaml
    from transformers import LlamaConfig, LlamaForCausalLM

    from endprompt.data.indexed import write_indexed
    from tests.support.tiny import make_tiny_tokenizer

    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=arguments.layers, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(workspace / "model")
    make_tiny_tokenizer(workspace / "model")
    tokens = np.random.default_rng(0).integers(0, 49152, size=arguments.length * arguments.batch * (arguments.steps + 1))
    write_indexed(workspace / "corpus", [tokens], dtype=np.int32)
    recipe = {
        "name": "bench-step",
        "model": {"path": str(workspace / "model"), "architecture": "custom", "original_length": 8192},
        "target_length": 65536,
        "positions": {"scheme": "endprompt", "physical_length": arguments.length, "displaced_length": 20},
        "data": {"train": [{"path": str(workspace / "corpus")}]},
        "training": {
            "steps": arguments.steps,
            "global_batch_size": arguments.batch,
            "micro_batch_size": arguments.batch // RANKS // 2,
            "learning_rate": 1e-5,
            "warmup_steps": 0,
            "precision": arguments.precision,
        },  # fmt: skip
        "deepspeed": {"config": str(ROOT / "deepspeed_configs/zero3.json")},
        "output": {"directory": "replaced", "save_interval": 1000},
    }
    (workspace / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def trainer_rank(workspace: Path, arguments: argparse.Namespace) -> None:
    """One rank of the Trainer's side."""
    import torch

    from endprompt.data.indexed import open_indexed
    from endprompt.zero3.backend import init_distributed

    init_distributed()
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    settings = json.loads((ROOT / "deepspeed_configs/zero3.json").read_text())
    settings |= {
        name: "auto" for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    }
    bf16 = arguments.precision == "bf16"
    settings |= {"bf16": {"enabled": bf16}, "steps_per_print": 10**9}
    training = TrainingArguments(
        output_dir=str(workspace / "trainer"), max_steps=arguments.steps, per_device_train_batch_size=arguments.batch // RANKS // 2,
        gradient_accumulation_steps=2, learning_rate=1e-5, lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=bf16,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, max_grad_norm=1.0, deepspeed=settings,
        save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=not torch.cuda.is_available(), seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        workspace / "model", dtype=torch.bfloat16 if bf16 else torch.float32, attn_implementation="sdpa"
    )
    text = open_indexed(workspace / "corpus")
    rows = [torch.from_numpy(text.read(i * arguments.length, arguments.length)) for i in range(arguments.batch * arguments.steps)]

    class Timer(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.started = time.monotonic()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.monotonic() - self.started)

    trainer = Trainer(model=model, args=training, train_dataset=[{"input_ids": row, "labels": row} for row in rows], callbacks=[Timer()])
    trainer.train()
    if os.environ["RANK"] == "0":
        (workspace / "trainer.json").write_text(json.dumps(Timer.seconds))


if __name__ == "__main__":
    run_command(main)
