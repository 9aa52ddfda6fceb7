"""Memory of a rank of the Megatron-Core engine: sharded states, activations in flight in the pipeline, and the stock loss.

Held against real peaks of small models on CPUs in tests/planning/test_megatron_memory_real.py. Per rank of a layout TP x PP x
CP x DP; T = micro_batch x length / CP tokens, w bytes of a weight. Norms and the residual stream are cut by TP only under sequence
parallelism; everything else of a layer is. `cluster.fused_layers`: Transformer Engine's layers and flash attention, or what
autograd keeps of torch's on a CPU.
"""

from __future__ import annotations

from endprompt.models.architectures import Architecture
from endprompt.models.layout import Layout
from endprompt.planning.cluster import Cluster
from endprompt.planning.memory import GB, Memory


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
    """Predicted peak of the fullest rank: a stage at either end of the pipeline. recompute: none, selective or full."""
    a, w, t = architecture, 2 if precision == "bf16" else 4, layout.tensor
    phases: dict[str, dict[str, float]] = {}
    ends = [("the only stage", True, True)] if layout.pipeline == 1 else [("first stage", True, False), ("last stage", False, True)]
    for name, embeds, has_head in ends:
        parameters = stage_parameters(a, layout, embeds=embeds, has_head=has_head)
        states = megatron_states(parameters, layout, distributed_optimizer, precision)
        in_flight = layers_in_flight(a, layout, first=embeds)
        runtime = {"runtime": cluster.runtime_gb * GB}
        shared = {**states, **runtime, "buffers": _buffers(a, length, micro_batch, layout, w)}
        kept, layer, working = activation_bytes(a, length, micro_batch, layout, recompute, w, fused=cluster.fused_layers)
        activations = {"activations": in_flight * kept, "recomputed layer" if recompute == "full" else "backward": layer + working}
        phases[name] = {**shared, **activations}
        if has_head:
            loss = loss_bytes(a, length, micro_batch, layout, w, fused=cluster.fused_layers)
            phases[f"{name}, loss"] = {**shared, "activations": in_flight * kept, "loss": loss}
        phases[f"{name}, built"] = {**runtime, **built_bytes(parameters, distributed_optimizer, w)}
        # Buckets are views of the gradient buffer and are reduced in place; gloo scatters out of a copy.
        copied = 4 * parameters if distributed_optimizer else 0.0
        phases[f"{name}, reduce"] = {**shared, "collectives": cluster.collective_copies * copied}
        if not cluster.fused_layers:  # torch's Adam goes through parameter by parameter with two temporaries, fused ones have none
            largest = max(a.embedding_parameters, 2 * a.hidden_size * a.ffn_size) / t
            share = min(largest, parameters / _shards(layout, distributed_optimizer))
            phases[f"{name}, update"] = {**shared, "optimizer step": 2 * 4 * share}
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


def built_bytes(parameters: float, distributed_optimizer: bool, w: int) -> dict[str, float]:
    """Before there is an optimizer: the distributed one has DDP copy the weights into a flat buffer, beside that of gradients."""
    return {"weights": w * parameters * (1 + distributed_optimizer), "gradients": 4 * parameters}


def activation_bytes(
    architecture: Architecture, length: int, micro_batch: int, layout: Layout, recompute: str, w: int = 2, *, fused: bool = True
) -> tuple[float, float, float]:
    """Bytes a layer keeps for one micro-batch, a recomputed layer's bytes beyond that, and the gradients at work in its MLP.

    `full` keeps the input of the layer only. `selective` recomputes the attention core, which under flash attention keeps nothing
    that others do not: its output is the input of the next product (measured: the same peak as `none`).
    """
    a, tokens, t = architecture, micro_batch * length / layout.context, layout.tensor
    stream = t if layout.sequence_parallel else 1
    whole = tokens * saved_bytes(a, layout, w, fused=fused)
    if layout.context > 1 and not fused:  # torch's attention makes a mask of both chunks' queries by the keys up to their ends
        chunk = length / (2 * layout.context)
        whole += w * chunk * chunk * (2 * layout.context + 1)
    working = tokens * w * (2 * a.ffn_size / t + a.hidden_size / stream)
    if layout.sequence_parallel:  # a column-parallel product gathers its input, in forward and for the weight's gradient
        working += tokens * w * a.hidden_size
    if recompute == "full":
        return tokens * w * a.hidden_size / stream, whole, working
    return whole, 0.0, working


def saved_bytes(architecture: Architecture, layout: Layout, w: int, *, fused: bool) -> float:
    """What autograd keeps of one layer, a token.

    Fused: input, two normed inputs and the residual between (4 h), q, k, v and the attention output (2 q + 2 k), gate, up, and
    their product (3 f). On a CPU torch composes the norms: in bf16 each keeps its input and the normed state in fp32 and the
    weighted one (4 + 4 + 2 h), in fp32 the latter two (4 + 4 h) beside the residual itself (4 h). v is a view of the product of
    all three, which stays whole beside the turned q and k (3 q + 3 k with the output), silu(gate) and a copy of up come on top
    (5 f), and every layer makes sines and cosines for q and for k (4 d). Under context parallelism it keeps all ranks' keys and
    values, and the output both in chunks and joined (3 q + 2 CP k).
    """
    a, t = architecture, layout.tensor
    stream = t if layout.sequence_parallel else 1
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    if fused:
        return w * (4 * a.hidden_size / stream + (2 * query + 2 * key + 3 * a.ffn_size) / t)
    norms = (20 if w == 2 else 24) * a.hidden_size / stream
    keys = 3 * key if layout.context == 1 else 2 * layout.context * key
    return norms + w * ((3 * query + keys + 5 * a.ffn_size) / t + 4 * a.head_dim)


def loss_bytes(architecture: Architecture, length: int, micro_batch: int, layout: Layout, w: int = 2, *, fused: bool = True) -> float:
    """The stock vocab-parallel cross-entropy on [s/CP, b, V/TP], the head's backward and what the final norm keeps.

    bf16 logits (2 B) and their fp32 copy that becomes the softmax and then its gradient (4 B); backward again that and its bf16
    cast. In fp32 all of it is one tensor, changed in place (4 B). Then the head: that gradient in w bytes and the weight's,
    which is made apart from the fp32 buffer that it is added to.
    """
    a, tokens, t = architecture, micro_batch * length / layout.context, layout.tensor
    stream = t if layout.sequence_parallel else 1
    logits = tokens * (6 if w == 2 else 4)
    head = w * (tokens + a.hidden_size)
    norm = (2 * w if fused else 10 if w == 2 else 12) * tokens * a.hidden_size / stream
    gathered = w * tokens * a.hidden_size if layout.sequence_parallel else 0.0
    return max(logits, head) * a.vocab_size / t + norm + gathered


def _buffers(architecture: Architecture, length: int, micro_batch: int, layout: Layout, w: int) -> float:
    """Pipeline messages and the ring's keys and values. An end of the pipeline receives in one direction and sends in the other, in
    both only where chunks are interleaved."""
    a, tokens = architecture, micro_batch * length / layout.context
    stream = layout.tensor if layout.sequence_parallel else 1
    messages = 0 if layout.pipeline == 1 else 2 if layout.virtual == 1 else 4
    ring = 4 * tokens * 2 * a.kv_heads * a.head_dim * w / layout.tensor if layout.context > 1 else 0.0
    return messages * tokens * a.hidden_size * w / stream + ring
