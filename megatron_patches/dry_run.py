"""Build the whole layout without a cluster: every pipeline stage's real GPTModel on the meta device, in a pretended world.

torch's `fake` process group answers every collective without a peer, so the same `init_parallel` and `build_model` run that a
job will run; meta tensors have shapes and no memory. A 70B model at TP8 x PP4 takes seconds on a login node.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from endprompt.models.layout import Layout
from endprompt.recipe import Recipe
from endprompt.words import ranges
from megatron_patches import cpu_backend
from megatron_patches.prepare import Prepared


def describe_stages(recipe: Recipe, prepared: Prepared) -> list[str]:
    """One line per pipeline stage: layers, parameters and memory of states of one rank (tensor-parallel rank 0)."""
    cpu_backend.install()
    lines = [line for stage in range(prepared.layout.pipeline) for line in _stage(recipe, prepared, stage)]
    if recipe.megatron.distributed_optimizer:
        lines.append(f"host memory at a save or load: {_host_gb(prepared):.0f} GB a rank at most, times the ranks of a node")
    return lines


def _host_gb(prepared: Prepared) -> float:
    """Every rank gathers the optimizer states of its model-parallel part, 3 x fp32, so that any layout can load them."""
    a, layout = prepared.architecture, prepared.layout
    layers = a.layers / layout.pipeline * a.layer_parameters
    return 12 * (layers + a.embedding_parameters * (1 if layout.pipeline > 1 or a.tied else 2)) / layout.tensor / 1e9


def _stage(recipe: Recipe, prepared: Prepared, stage: int) -> list[str]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_patches.engine import init_parallel
    from megatron_patches.load import global_names
    from megatron_patches.model import build_model

    layout = prepared.layout
    rank = stage * (layout.world_size // layout.pipeline)  # Megatron's order of ranks is tp-cp-ep-dp-pp: stages lie furthest apart
    dist.init_process_group("fake", rank=rank, world_size=layout.world_size, store=FakeStore())
    try:
        init_parallel(layout, gloo_groups=False)
        with torch.device("meta"):
            chunks = build_model(recipe, prepared.architecture, layout, prepared.config)
        named = [pair for chunk in chunks for pair in global_names(chunk)]
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return describe_stage(stage, named, recipe, layout)


def describe_stage(stage: int, named: list[tuple[str, torch.Tensor]], recipe: Recipe, layout: Layout) -> list[str]:
    """Layers, shapes and bytes of one rank's parameters. Memory in 10^9 bytes, states only: no activations, no buffers."""
    parameters = sum(tensor.numel() for _, tensor in named)
    numbers = sorted({int(name.split(".")[2]) for name, _ in named if name.startswith("decoder.layers.")})
    ends = [name.split(".")[0] for name, _ in named if name.startswith(("embedding", "output_layer"))]
    width = 2 if recipe.training.precision == "bf16" else 4
    share = layout.data * layout.context if recipe.megatron.distributed_optimizer else 1
    # The weights, gradients accumulated in fp32, and fp32 master weights (bf16 only) with two Adam moments.
    optimizer = (12 if width == 2 else 8) / share
    bytes_each = {"weights": width, "gradients": 4, "optimizer": optimizer}
    states = " + ".join(f"{name} {size * parameters / 1e9:.2f}" for name, size in bytes_each.items())
    total = sum(bytes_each.values()) * parameters / 1e9
    held = f"layers {ranges(numbers)}" + "".join(f" + {end}" for end in ends)
    lines = [f"stage {stage}: {held}: {parameters / 1e9:.3f} B parameters; {states} = {total:.2f} GB"]
    if stage == 0:
        of_layer = [pair for pair in named if pair[0].startswith(f"decoder.layers.{numbers[0]}.")]
        shapes = [f"{name.split('.', 3)[3].removesuffix('.weight')} {list(tensor.shape)}" for name, tensor in of_layer if tensor.dim() > 1]
        lines.append(f"a layer's matrices on a rank: {', '.join(shapes)}")
    return lines
