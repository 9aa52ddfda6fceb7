"""Memory of a rank of the Megatron-Core engine: sharded states, activations in flight in the pipeline, and the stock loss.

Per rank of a layout TP x PP x CP x DP; T = micro_batch x length / CP tokens. Norms and the residual stream are cut by TP only
under sequence parallelism; everything else of a layer is. Figures are for Transformer Engine's layers and flash attention.
"""

from __future__ import annotations

from endprompt.models.architectures import Architecture
from endprompt.models.layout import Layout
from endprompt.planning.cluster import Cluster
from endprompt.planning.memory import GB, Memory

DDP_BUCKET = 4e7
"""Numbers of gradient in one bucket of Megatron's DDP (its default is max(4e7, 1e6 x data-parallel ranks))."""


def megatron_memory(
    architecture: Architecture,
    length: int,
    micro_batch: int,
    cluster: Cluster,
    layout: Layout,
    *,
    recompute: str,
    distributed_optimizer: bool = True,
    precision: str = "bf16",
) -> Memory:
    """Predicted peak of the fullest rank: a stage at either end of the pipeline. recompute: none, selective or full.

    The update adds nothing: gradients are fp32 already, and the optimizer reads its shard of them in place.
    """
    phases: dict[str, dict[str, float]] = {}
    ends = [("the only stage", True, True)] if layout.pipeline == 1 else [("first stage", True, False), ("last stage", False, True)]
    for name, embeds, has_head in ends:
        parameters = stage_parameters(architecture, layout, embeds=embeds, has_head=has_head)
        states = megatron_states(parameters, layout, distributed_optimizer, precision)
        in_flight = layers_in_flight(architecture, layout, first=embeds)
        shared = {**states, "runtime": cluster.runtime_gb * GB, "buffers": _buffers(architecture, length, micro_batch, layout)}
        kept, layer, working = activation_bytes(architecture, length, micro_batch, layout, recompute)
        activations = {"activations": in_flight * kept, "recomputed layer" if recompute == "full" else "backward": layer + working}
        phases[name] = {**shared, **activations}
        if has_head:
            loss = loss_bytes(architecture, length, micro_batch, layout)
            phases[f"{name}, loss"] = {**shared, "activations": in_flight * kept, "loss": loss}
    return Memory(phases)


def stage_parameters(architecture: Architecture, layout: Layout, *, embeds: bool, has_head: bool) -> float:
    """Numbers on one rank: its layers' matrices / TP and norms whole, and what an end of the pipeline adds.

    A tied head is a copy on the last stage where the pipeline has more than one.
    """
    a = architecture
    matrices = (a.layer_parameters - 2 * a.hidden_size) / layout.tensor + 2 * a.hidden_size
    ends = int(embeds) + int(has_head and not (a.tied and layout.pipeline == 1))
    return a.layers / layout.pipeline * matrices + ends * a.embedding_parameters / layout.tensor + has_head * a.hidden_size


def megatron_states(parameters: float, layout: Layout, distributed_optimizer: bool, precision: str) -> dict[str, float]:
    """Bytes of weights (2), the fp32 gradient buffer (4), and master weights and moments (12, over DP x CP ranks).

    In fp32 the weight is its own master, except that the distributed optimizer keeps a view of it: 4 + 4 + 8.
    """
    shards = _shards(layout, distributed_optimizer)
    weight, optimizer = (2, 12) if precision == "bf16" else (4, 8)
    return {"weights": weight * parameters, "gradients": 4 * parameters, "optimizer": optimizer * parameters / shards}


def _shards(layout: Layout, distributed_optimizer: bool) -> int:
    return layout.data * layout.context if distributed_optimizer else 1


def layers_in_flight(architecture: Architecture, layout: Layout, *, first: bool) -> float:
    """Layers, each for one micro-batch, whose activations a stage holds at once.

    1F1B: stage i of p holds p - i micro-batches of L/p layers, so the first holds L. Interleaved with v chunks: 2 (p - i - 1)
    + (v - 1) p chunks of warm-up and the one at work, of L/(p v) layers each: L (1 + (p - 1)/(p v)) on the first. Never more
    than the micro-batches of the step.
    """
    p, v, m = layout.pipeline, layout.virtual, layout.micro_steps
    stage = 0 if first else p - 1
    per_stage = architecture.layers / p
    if p == 1:
        return per_stage
    if v == 1:
        return min(p - stage, m) * per_stage
    chunks = 2 * (p - stage - 1) + (v - 1) * p + 1
    return min(chunks, m * v) * per_stage / v


def activation_bytes(
    architecture: Architecture, length: int, micro_batch: int, layout: Layout, recompute: str
) -> tuple[float, float, float]:
    """Bytes a layer keeps for one micro-batch, a recomputed layer's bytes beyond that, and the gradients at work in its MLP.

    A whole layer, a token: input, two normed inputs and the residual between (8 h), q, k, v and the attention output (4 q + 4 k),
    gate, up, and their product (6 f). `selective` recomputes the attention core, which under flash attention keeps little
    anyway: its output (2 q). `full` keeps the input of the layer only, 2 h.
    """
    a, tokens, t = architecture, micro_batch * length / layout.context, layout.tensor
    stream = t if layout.sequence_parallel else 1
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    whole = tokens * (8 * a.hidden_size / stream + (4 * query + 4 * key + 6 * a.ffn_size) / t)
    working = tokens * (4 * a.ffn_size / t + 2 * a.hidden_size / stream)
    if layout.sequence_parallel:  # a column-parallel product gathers its input, in forward and for the weight's gradient
        working += tokens * 2 * a.hidden_size
    if recompute == "full":
        return tokens * 2 * a.hidden_size / stream, whole, working
    kept = whole - tokens * 2 * query / t if recompute == "selective" else whole
    return kept, 0.0, working


def loss_bytes(architecture: Architecture, length: int, micro_batch: int, layout: Layout) -> float:
    """The stock vocab-parallel cross-entropy on [s/CP, b, V/TP]: bf16 logits (2 B), their fp32 copy that becomes the softmax
    and then its gradient (4 B), and that gradient in bf16 on its way to the head (2 B)."""
    tokens = micro_batch * length / layout.context
    return tokens * architecture.vocab_size / layout.tensor * (2 + 4 + 2)


def _buffers(architecture: Architecture, length: int, micro_batch: int, layout: Layout) -> float:
    """Pipeline messages (received and sent, both directions), the ring's keys and values, and a DDP bucket in flight."""
    a, tokens = architecture, micro_batch * length / layout.context
    stream = layout.tensor if layout.sequence_parallel else 1
    messages = 4 * tokens * a.hidden_size * 2 / stream if layout.pipeline > 1 else 0.0
    ring = 4 * tokens * 2 * a.kv_heads * a.head_dim * 2 / layout.tensor if layout.context > 1 else 0.0
    return messages + ring + 4 * DDP_BUCKET
