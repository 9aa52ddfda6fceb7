#!/usr/bin/env python3
"""Time of checkpoint conversion against mbridge, the same 1B-shaped model in both directions, one process, no GPU.

    pip install --no-deps --target DIR mbridge==0.15.1
    python benchmarks/bench_bridge.py --mbridge DIR --output benchmarks/results/bridge.json

mbridge as published cannot run without Transformer Engine and a GPU (Megatron-Bridge cannot even be imported): its model has Transformer
Engine's layers and is moved to the GPU. `_bridge` gives it Megatron's own layers, their names and a CPU, and leaves its reading,
mapping, splitting and writing as they are. Only these and Megatron's own save and load of a checkpoint are timed, not the making of
the model that it needs; ours is the whole conversion, with digests. Both read files that were dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.bench_conversion import BILLION, fill, forget
from benchmarks.machine import describe_machine
from endprompt.atomic import write_json
from endprompt.checkpoint.conversion import default_workers
from endprompt.errors import run_command
from tests.support.conversions import convert
from tests.support.sparse import make_sparse_checkpoint

DIRECTIONS = ("to_megatron", "to_huggingface")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--mbridge", type=Path, required=True, help="folder that mbridge was installed into")
    parser.add_argument("--output", type=Path, help="where to write the JSON result")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16, help="of the model (default: 16, 2.47 GB)")
    parser.add_argument("--peer", nargs=2, type=Path, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(peer(arguments.mbridge, *arguments.peer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), arguments)
    medians = {side: {name: statistics.median(times) for name, times in found.items()} for side, found in seconds.items()}
    result = {
        "what": "seconds to convert: ours whole, mbridge 0.15.1 without the making of its model",
        "machine": describe_machine(),
        "layers": arguments.layers,
        "seconds": seconds,
        "times_faster": {name: round(medians["mbridge"][name] / medians["ours"][name], 2) for name in DIRECTIONS},
    }
    print(json.dumps(result, indent=2))
    if arguments.output:
        write_json(arguments.output, result)


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    source, middle, out = folder / "hf", folder / "megatron", folder / "out"
    make_sparse_checkpoint(source, shard_gb=0.6, num_hidden_layers=arguments.layers, **BILLION)
    fill(source)
    convert("to megatron", source, middle)
    seconds: dict[str, dict[str, list[float]]] = {side: {name: [] for name in DIRECTIONS} for side in ("ours", "mbridge")}
    for _ in range(arguments.rounds):
        for name, words, place in (("to_megatron", "to megatron", source), ("to_huggingface", "to huggingface", middle)):
            forget(place)
            began = time.perf_counter()
            convert(words, place, out, workers=default_workers())
            seconds["ours"][name].append(round(time.perf_counter() - began, 2))
            shutil.rmtree(out)
            os.sync()
        forget(source)
        command = [sys.executable, __file__, "--mbridge", str(arguments.mbridge), "--peer", str(source), str(out)]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for name, value in json.loads(run.stdout.splitlines()[-1]).items():
            seconds["mbridge"][name].append(round(value, 2))
        shutil.rmtree(out)
        os.sync()
    return seconds


def peer(installed: Path, source: Path, out: Path) -> dict[str, float]:
    """Seconds of both directions by mbridge in this process."""
    sys.path.append(str(installed))
    from megatron_patches import cpu_backend

    cpu_backend.install()  # Megatron-Core's own writer asks for a GPU too
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    bridge = _bridge(source)
    # These two flags together are mbridge's one way to leave the model on the CPU.
    models = bridge.get_model(use_torch_fsdp2=True, use_cpu_initialization=True, bf16=False)
    models = [model.bfloat16() for model in models]
    hf, megatron = out / "hf", out / "megatron"
    for folder in (hf, megatron):
        folder.mkdir(parents=True)

    began = time.perf_counter()
    with torch.no_grad():
        bridge.load_weights(models, str(source))
    dist_checkpointing.save(models[0].sharded_state_dict(), str(megatron))
    os.sync()
    there = time.perf_counter() - began

    forget(megatron)
    began = time.perf_counter()
    models[0].load_state_dict(dist_checkpointing.load(models[0].sharded_state_dict(), str(megatron)), strict=False)
    with torch.no_grad():
        bridge.save_weights(models, str(hf))
    os.sync()
    return {"to_megatron": there, "to_huggingface": time.perf_counter() - began}


def _bridge(source: Path):
    """mbridge's LLaMA bridge with Megatron's own layers: their two norms have other names than Transformer Engine's fused ones."""
    from mbridge.models.llama import LLaMABridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from transformers import AutoConfig

    class LocalBridge(LLaMABridge):
        def _weight_name_mapping_mcore_to_hf(self, name):
            fused = {"input_layernorm.weight": "self_attention.linear_qkv", "pre_mlp_layernorm.weight": "mlp.linear_fc1"}
            for local, module in fused.items():
                if name.endswith(local):
                    name = name.replace(local, f"{module}.layer_norm_weight")
            return super()._weight_name_mapping_mcore_to_hf(name)

        def _get_transformer_layer_spec(self, vp_stage=None):
            self.has_vp_stage = True
            return get_gpt_layer_local_spec(normalization="RMSNorm")

    config = AutoConfig.from_pretrained(source)
    config.rope_theta = 500000.0  # transformers 5 keeps it in rope_parameters, where mbridge 0.15.1 does not look
    bridge = LocalBridge(config)
    bridge.set_extra_args(
        use_cpu_initialization=True, perform_initialization=False, persist_layer_norm=False, gradient_accumulation_fusion=False
    )
    return bridge


if __name__ == "__main__":
    run_command(main)
