#!/usr/bin/env python3
"""Time what the patches add to a Megatron-Core training step: upstream and patched in turn, on the same model and batch.

    python benchmarks/bench_megatron.py --output benchmarks/results/megatron.json

Work is equal: ordinary positions, upstream's own layers, forward and backward of one micro-batch. Each pair of steps runs
upstream first or second by turns, so that drift of the machine falls on both; the result is the median of the ratios of pairs.
On a GPU the layers have Llama-3-8B's shapes at 8192 tokens; on a CPU smaller ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import describe_machine
from endprompt.atomic import write_json
from endprompt.errors import run_command
from megatron_patches import cpu_backend

CPU = {"layers": 4, "hidden": 512, "ffn": 1536, "heads": 8, "groups": 4, "head_dim": 64, "vocabulary": 8192, "length": 512, "samples": 2}
GPU = {
    "layers": 4, "hidden": 4096, "ffn": 14336, "heads": 32, "groups": 8, "head_dim": 128, "vocabulary": 32768, "length": 8192, "samples": 1,
}  # fmt: skip
"""GPU: Llama-3-8B's layers. On a GPU `samples` is one, so the per-sample table is that of a micro-batch of one."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="where to write the JSON result")
    parser.add_argument("--pairs", type=int, default=40)
    arguments = parser.parse_args()
    cpu_backend.install()
    import torch

    from tests.support.one_rank import one_rank_world

    shape = GPU if torch.cuda.is_available() else CPU
    with one_rank_world():
        model, step = build(shape)
        ratios = {name: measure(step, one_layout, arguments.pairs) for name, one_layout in (("per_sample", False), ("one_table", True))}
    tokens = shape["length"] * shape["samples"]
    result = {
        "what": "seconds of forward and backward of one micro-batch, upstream and patched by turns, equal work",
        "machine": describe_machine(),
        "shape": shape,
        "pairs": arguments.pairs,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: summary(pairs, tokens) for name, pairs in ratios.items()},
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def build(shape: dict):
    """(model, step): step() runs forward and backward and returns seconds."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_patches.modules import CausalAttention

    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = TransformerConfig(
        num_layers=shape["layers"], hidden_size=shape["hidden"], ffn_hidden_size=shape["ffn"], num_attention_heads=shape["heads"],
        num_query_groups=shape["groups"], kv_channels=shape["head_dim"], normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, hidden_dropout=0.0, attention_dropout=0.0, params_dtype=dtype,
        bf16=on_gpu, use_cpu_initialization=not on_gpu, persist_layer_norm=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, gradient_accumulation_fusion=False,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    model = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=shape["vocabulary"], max_sequence_length=shape["length"],
        position_embedding_type="rope",
    )  # fmt: skip
    device = torch.device("cuda" if on_gpu else "cpu")
    model.to(device)
    tokens = torch.randint(0, shape["vocabulary"], (shape["samples"], shape["length"]), device=device)
    positions = torch.arange(shape["length"], device=device).repeat(shape["samples"], 1)

    def step() -> float:
        started = time.perf_counter()
        model.zero_grad()
        model(tokens, positions, None, labels=tokens).mean().backward()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return model, step


def measure(step, one_layout: bool, pairs: int) -> list[tuple[float, float]]:
    """(upstream, patched) seconds of each pair."""
    import megatron_patches
    from megatron_patches import rotary

    def upstream() -> float:
        megatron_patches.remove()
        return step()

    def patched() -> float:
        megatron_patches.apply()
        rotary.state.one_layout = one_layout
        return step()

    for warm_up in (upstream, patched, upstream, patched):
        warm_up()
    found = []
    for number in range(pairs):
        if number % 2:
            second, first = patched(), upstream()
        else:
            first, second = upstream(), patched()
        found.append((first, second))
    megatron_patches.remove()
    return found


def summary(pairs: list[tuple[float, float]], tokens: int) -> dict:
    ratios = sorted(patched / upstream for upstream, patched in pairs)
    upstream = statistics.median(first for first, _ in pairs)
    return {
        "median_seconds_upstream": round(upstream, 5),
        "median_seconds_patched": round(statistics.median(second for _, second in pairs), 5),
        "tokens_per_second_upstream": round(tokens / upstream, 1),
        "overhead": round(statistics.median(ratios) - 1, 5),
        "overhead_quartiles": [round(ratios[len(ratios) // 4] - 1, 5), round(ratios[3 * len(ratios) // 4] - 1, 5)],
    }


if __name__ == "__main__":
    run_command(main)
