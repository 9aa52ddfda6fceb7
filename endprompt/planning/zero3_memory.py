"""Memory of a rank of ds_train.py: ZeRO-3 states, gathered weights, activations of transformers' LLaMA, and the chunked loss.

Held against real peaks of small models in tests/planning/test_zero3_memory.py. Symbols: P parameters, N ranks, T tokens of a
micro-batch, h hidden, q query width, k key/value width, f feed-forward width, V vocabulary, w bytes of a weight.
"""

from __future__ import annotations

from endprompt.loss import CHUNK_BYTES
from endprompt.models.architectures import Architecture
from endprompt.planning.cluster import Cluster
from endprompt.planning.memory import GB, Memory
from endprompt.zero3.config import offload_device

DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
    "sub_group_size": 1e9,
}
"""DeepSpeed's own values of keys that a settings file may leave out, in numbers (deepspeed/runtime/zero/config.py)."""


def zero3_memory(
    architecture: Architecture,
    length: int,
    micro_batch: int,
    cluster: Cluster,
    situation: dict,
    *,
    precision: str = "bf16",
    checkpointing: bool = True,
) -> Memory:
    """Predicted peak of one rank. situation: a settings file as `read_situation` gives it."""
    a, w = architecture, 2 if precision == "bf16" else 4
    tokens, parameters = micro_batch * length, a.parameters
    states, host = zero3_states(parameters / cluster.gpus, situation, precision)

    def setting(key: str) -> float:
        return float(situation["zero_optimization"].get(key, DEFAULTS[key]))

    largest = max(a.embedding_parameters, 3 * a.hidden_size * a.ffn_size)
    filled = min(setting("reduce_bucket_size"), parameters)  # a model smaller than a bucket leaves the rest of it untouched
    bucket = w * (filled if cluster.touched_only else setting("reduce_bucket_size"))
    # Weights stay gathered while they are to be used again within max_live numbers; the module at hand comes on top.
    gathered = w * min(parameters, setting("stage3_max_live_parameters") + largest)
    group = 4 * min(setting("sub_group_size"), parameters / cluster.gpus)
    fixed = {**states, "buffers": bucket, "runtime": cluster.runtime_gb * GB}

    kept = (a.layers + 1) * tokens * a.hidden_size * w if checkpointing else a.layers * tokens * saved_bytes(a, w, with_input=True)
    # Gradients of one layer's MLP on their way back: of the product, of both its factors, less the product; and of the residual.
    backward = tokens * w * (2 * a.ffn_size + 2 * a.hidden_size)
    recomputed = tokens * saved_bytes(a, w) + backward if checkpointing else backward
    copies = cluster.collective_copies
    pending = w * a.embedding_parameters  # the head's gradient, until its reduction is done
    phases = {
        "gather": {**fixed, "gathered parameters": gathered * (1 + copies * _in_flight(setting, parameters)), "activations": kept},
        "loss": {**fixed, "gathered parameters": gathered, "activations": kept, "loss": loss_bytes(a, tokens, w)},
        "layer": {
            **fixed,
            "gathered parameters": gathered,
            "activations": kept,
            "recomputed layer" if checkpointing else "backward": recomputed,
            "loss": pending,
        },
        "reduce": {**fixed, "gathered parameters": w * min(parameters, largest), "collectives": w * filled * (1 + copies)},
        "step": {**fixed, "optimizer step": group if states["optimizer"] else 0.0},  # one group's gradients, flat
    }
    return Memory(phases, host)


def zero3_states(share: float, situation: dict, precision: str) -> tuple[dict[str, float], float]:
    """Bytes of weights, gradients and optimizer on the GPU for `share` parameters, and bytes on the host.

    18 B a parameter in bf16 (weight 2, accumulated fp32 gradient 4, master weight and moments 12) and 20 in fp32: DeepSpeed
    0.19 means to share weight and master there, but compares a device with its name, so it copies (found by listing the
    tensors of a run). Offloaded, it keeps the gradient twice: 20 B, and 22 B with the weights.
    """
    weight, master = 2 if precision == "bf16" else 4, 4
    parameters_out = offload_device(situation, "offload_param") != "none"
    optimizer_out = parameters_out or offload_device(situation, "offload_optimizer") != "none"
    states = {
        "weights": 0.0 if parameters_out else weight * share,
        "gradients": 0.0 if optimizer_out else 4 * share,
        "optimizer": 0.0 if optimizer_out else (8 + master) * share,
    }
    host = (8 + master + 4 + 4) * share if optimizer_out else 0.0
    return states, host + (weight * share if parameters_out else 0.0)


def saved_bytes(architecture: Architecture, w: int, *, with_input: bool = False) -> float:
    """What autograd keeps of one transformers LLaMA layer, a token.

    bf16: each norm keeps its input in fp32, the normed and the weighted state (4 + 2 + 2 h); attention q, k, v and its output;
    the MLP gate, silu(gate), up and their product. fp32: the norm's input is the residual itself, the layer's own input being
    the checkpoint, or counted with `with_input`.
    """
    a = architecture
    query, key = a.heads * a.head_dim, a.kv_heads * a.head_dim
    norms = 16 * a.hidden_size if w == 2 else (20 + 4 * with_input) * a.hidden_size
    return norms + w * (2 * query + 2 * key + 4 * a.ffn_size)


def loss_bytes(architecture: Architecture, tokens: int, w: int) -> float:
    """Of endprompt/loss.py and the final norm: the head's gradient summed in fp32 and one chunk's share of it, the gradient of
    the states, a chunk of logits in fp32 and in w bytes, and what the norm keeps."""
    head = architecture.embedding_parameters * (6 if w == 2 else 4)
    chunk = min(CHUNK_BYTES, 4 * tokens * architecture.vocab_size)
    norm = 8 * tokens * architecture.hidden_size  # 4 + 2 + 2 in bf16, 4 + 4 in fp32, where its input is the residual
    return head + tokens * architecture.hidden_size * w + chunk * (1 + w / 4) + norm


def _in_flight(setting, parameters: int) -> float:
    """Share of the gathered weights that one prefetch has under way."""
    return min(1.0, setting("stage3_prefetch_bucket_size") / parameters)
