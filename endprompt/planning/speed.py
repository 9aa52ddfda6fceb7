"""Where the seconds of an optimizer step go, as a sum that is linear in a few efficiencies (`Efficiencies`).

Arithmetic is counted at the GPU's peak: matrix products and attention apart, because a kernel of attention reaches a third of
the peak and a large matrix product 60 %. Elementwise work is counted under ZeRO-3, where layers are PyTorch's own (`elementwise`);
of Transformer Engine's fused layers calibration puts it into Megatron's efficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass

from endprompt.models.architectures import Architecture, forward_flops_per_token
from endprompt.planning.cluster import Cluster
from endprompt.planning.elementwise import elementwise_seconds

RECOMPUTE = {"none": (0.0, 0.0), "selective": (0.0, 1.0), "full": (1.0, 1.0)}
"""Further forward passes of the layers' matrix products, and of attention, that the backward pass makes."""

HIDING_ATTENTION = 0.3
"""Efficiency of attention assumed when asking whether it hides a ring of keys and values (close to what calibration gives)."""

UPDATE_BYTES = 30
"""HBM traffic of AdamW a parameter: gradient, master weight and two moments read, three written, the bf16 weight: 4+12+12+2."""


@dataclass(frozen=True)
class Efficiencies:
    """gemm, attention: share of the bf16 peak.

    communication: seconds of a step for each that ZeRO-3's collectives take at 80 % of the links' rate. Arithmetic hides some of
    them; above 1 the links reach less than that.
    """

    gemm: float
    attention: float
    communication: float = 1.0


@dataclass(frozen=True)
class Seconds:
    """Of one optimizer step on the slowest GPU: arithmetic at peak rate, ZeRO-3's collectives, and what depends on neither."""

    gemm: float = 0.0
    attention: float = 0.0
    communication: float = 0.0
    fixed: float = 0.0

    def total(self, efficiencies: Efficiencies) -> float:
        return (
            self.gemm / efficiencies.gemm
            + self.attention / efficiencies.attention
            + self.communication * efficiencies.communication
            + self.fixed
        )


def layer_flops(architecture: Architecture, length: int) -> tuple[float, float, float]:
    """Forward FLOPs a token: one layer's matrix products, one layer's causal attention, the output head."""
    matmul = 2 * (architecture.layer_parameters - 2 * architecture.hidden_size)
    attention = (forward_flops_per_token(architecture, length) - 2 * architecture.matmul_parameters) / architecture.layers
    return matmul, attention, 2 * architecture.embedding_parameters


def recomputed(architecture: Architecture, recompute: str) -> tuple[float, float]:
    """RECOMPUTE, and torchtitan's per-operator policy: every second product of q, k, v, o, gate, up, down, so k, o and up."""
    if recompute != "half":
        return RECOMPUTE[recompute]
    a = architecture
    products = a.hidden_size * ((a.heads + a.kv_heads) * a.head_dim + a.ffn_size)
    return products / (a.layer_parameters - 2 * a.hidden_size), 0.0


def zero3_seconds(
    architecture: Architecture,
    length: int,
    micro_batch: int,
    micro_steps: int,
    recompute: str,
    cluster: Cluster,
    *,
    offload_optimizer: bool = False,
    offload_parameters: bool = False,
    layers: str = "eager",
    gradient_bytes: int = 2,
    sharded: int | None = None,
    context: int = 1,
) -> Seconds:
    """ZeRO-3 over all GPUs. A backward pass costs twice the forward, attention's 2.5 times (it recomputes its scores).

    A micro-step gathers the bf16 weights twice and scatters gradients of gradient_bytes once: 6 B a parameter in bf16. layers: how
    their elementwise operations are run; ds_train.py's are eager. In published rows only: sharded, the GPUs of a node that hold one
    copy of the states (gradients are then also reduced between nodes), and context, the GPUs that share a sample, whose messages
    are not counted.
    """
    products, attention, head = layer_flops(architecture, length)
    more_products, more_attention = recomputed(architecture, recompute)
    tokens = micro_batch * micro_steps * length / context
    per_node = min(cluster.gpus_per_node, cluster.gpus)
    ranks = sharded or cluster.gpus
    gather = cluster.collective_seconds((2 * 2 + gradient_bytes) * architecture.parameters, ranks, per_node)
    if ranks < cluster.gpus:  # an all-reduce of each GPU's share by its own network card
        gather += 2 * cluster.collective_seconds(gradient_bytes * architecture.parameters / ranks, cluster.gpus // ranks, 1)
    share = architecture.parameters / ranks
    update = UPDATE_BYTES * share / (0.7 * cluster.hbm)
    if offload_optimizer or offload_parameters:  # fp32 gradients down, bf16 weights up, AdamW at the host's pace
        update = (4 + 2) * share / cluster.pcie + UPDATE_BYTES * share / cluster.host_update
    if offload_parameters:
        update += 3 * 2 * share / cluster.pcie * micro_steps
    return Seconds(
        gemm=tokens * (architecture.layers * products * (3 + more_products) + 3 * head) / cluster.peak_flops,
        attention=tokens * architecture.layers * attention * (3.5 + more_attention) / cluster.peak_flops,
        communication=gather * micro_steps,
        fixed=update + elementwise_seconds(architecture, tokens, layers, recomputed=more_products > 0, hbm=cluster.hbm),
    )


def megatron_seconds(
    architecture: Architecture,
    length: int,
    micro_batch: int,
    micro_steps: int,
    recompute: str,
    cluster: Cluster,
    *,
    tensor: int,
    pipeline: int,
    virtual: int,
    context: int,
    data: int,
    distributed_optimizer: bool = True,
    overlap: bool = True,
    tensor_overlap: bool = False,
) -> Seconds:
    """Megatron-Core. The last stage, which has the output head too, sets the pace of the pipeline.

    Bubble: (p - 1) / v micro-batches beyond the m of a step (Narayanan et al. 2021). Tensor-parallel collectives are exposed
    unless `tensor_overlap` (Transformer Engine's user buffers, which this repository's engine does not set up).
    """
    products, attention, head = layer_flops(architecture, length)
    more_products, more_attention = RECOMPUTE[recompute]
    layers, tokens = architecture.layers / pipeline, micro_batch * length / context
    rounds = micro_steps + (pipeline - 1) / virtual
    gemm = tokens / tensor * (layers * products * (3 + more_products) + 3 * head) / cluster.peak_flops
    core = tokens / tensor * layers * attention * (3.5 + more_attention) / cluster.peak_flops
    exposed = 0.0
    hidden_states = tokens * architecture.hidden_size * 2
    if not tensor_overlap:  # a layer gathers and scatters twice in each direction, and again when it is recomputed
        passes = 8 + (4 if recompute == "full" else 0)
        exposed += layers * passes * cluster.collective_seconds(hidden_states, tensor, min(tensor, cluster.gpus_per_node))
    if context > 1:
        exposed += layers * _exposed_ring(architecture, tokens, attention, tensor, context, cluster)
    if pipeline > 1:
        exposed += 2 * virtual * hidden_states / tensor / (0.8 * cluster.network)
    update = _megatron_update(architecture, cluster, tensor, pipeline, context * data, distributed_optimizer, overlap, gemm + core)
    return Seconds(gemm=gemm * rounds, attention=core * rounds, fixed=exposed * rounds + update)


def _exposed_ring(architecture: Architecture, tokens: float, attention: float, tensor: int, context: int, cluster: Cluster) -> float:
    """Seconds a layer and micro-batch that passing keys and values round the ring (forward, and twice backward) outlasts attention."""
    size = tokens * 2 * architecture.kv_heads * architecture.head_dim * 2 / tensor * (context - 1)
    rate = cluster.nvlink if tensor * context <= cluster.gpus_per_node else cluster.network
    hiding = tokens / tensor * attention / (HIDING_ATTENTION * cluster.peak_flops)
    return max(0.0, 3 * size / (0.8 * rate) - 3.5 * hiding)


def _megatron_update(
    architecture: Architecture, cluster: Cluster, tensor: int, pipeline: int, ranks: int, distributed: bool, overlap: bool, hiding: float
) -> float:
    """fp32 gradients reduced (4 B), bf16 weights gathered (2 B), AdamW. Overlap hides what one micro-batch's arithmetic outlasts."""
    share = architecture.parameters / (tensor * pipeline)
    per_node = max(1, min(ranks, cluster.gpus_per_node // tensor))
    traffic = cluster.collective_seconds((6 if distributed else 8) * share, ranks, per_node)
    exposed = max(0.0, traffic - hiding / 0.5) if overlap else traffic
    return exposed + UPDATE_BYTES * share / (ranks if distributed else 1) / (0.7 * cluster.hbm)
