"""Layer parts that Megatron-Core lacks without Transformer Engine: causal attention under context parallelism, and RMSNorm
under sequence parallelism. They run on a CPU and on a GPU, and are the reference that faster kernels are held against.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch.nn.attention.bias import causal_lower_right


class CausalAttention(MegatronModule):
    """Core attention, causal by physical order, through torch's scaled_dot_product_attention (flash kernels on a GPU).

    Takes the place of DotProductAttention, which holds all s x s scores and refuses context parallelism. Under context
    parallelism keys and values of all ranks are gathered (backward: summed and scattered) and put into physical order;
    each of the two chunks that a rank holds then attends to the keys up to its own end, so no masked score is computed.
    """

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None, cp_comm_type=None,
        pg_collection=None,
    ):  # fmt: skip
        super().__init__(config=config)
        self._group = pg_collection.cp if pg_collection is not None else parallel_state.get_context_parallel_group()
        self._scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        if (config.attention_dropout if attention_dropout is None else attention_dropout) != 0.0:
            raise ValueError("attention dropout would make a run depend on its layout; set it to 0")

    def forward(
        self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None, **kernel_hints
    ):
        """query [s, b, heads, d], key and value [s, b, groups, d] -> [s, b, heads * d]; packed thd: [t, .., d] -> [t, 1, heads * d].

        attention_mask is not read: samples are full, causal, and never cut at a jump of positions.
        """
        if attention_bias is not None:
            raise ValueError("attention bias is not supported")
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self._group.size() == 1:
            return self._attend(query, key, value)
        return self._context_parallel(query, key, value)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Queries are the last len(query) tokens of the keys."""
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        lengths = q.shape[2], k.shape[2]
        mask = {"is_causal": True} if lengths[0] == lengths[1] else {"attn_mask": causal_lower_right(*lengths)}
        out = F.scaled_dot_product_attention(q, k, v, scale=self._scale, enable_gqa=q.shape[1] != k.shape[1], **mask)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _context_parallel(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        size, rank, chunk = self._group.size(), self._group.rank(), query.shape[0] // 2
        order = [place for owner in range(size) for place in (owner, 2 * size - 1 - owner)]  # chunks as gathering lays them out
        to_physical = sorted(range(2 * size), key=order.__getitem__)

        def gather(part: torch.Tensor) -> torch.Tensor:
            chunks = gather_from_sequence_parallel_region(part.contiguous(), group=self._group).chunk(2 * size)
            return torch.cat([chunks[i] for i in to_physical])

        keys, values = gather(key), gather(value)
        outputs = []
        for place, part in zip((rank, 2 * size - 1 - rank), query.split(chunk), strict=True):
            end = (place + 1) * chunk
            outputs.append(self._attend(part, keys[:end], values[:end]))
        return torch.cat(outputs)

    def _packed(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed) -> torch.Tensor:
        """Sequences back to back; each attends to itself alone."""
        if self._group.size() > 1:
            raise ValueError("packed sequences under context parallelism need Transformer Engine: set megatron.transformer to it")
        lengths = packed.cu_seqlens_q.diff().tolist()
        sequences = zip(*(part.unsqueeze(1).split(lengths) for part in (query, key, value)), strict=True)
        return torch.cat([self._attend(*sequence) for sequence in sequences])


class RMSNorm(torch.nn.Module):
    """Megatron's norm interface over torch's rms_norm. Its weight carries `sequence_parallel`, so that Megatron sums its gradient
    over the tensor-parallel ranks, each of which sees a share of the tokens (upstream's torch norm refuses that)."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **ignored):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device(config)))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], self.weight, self.eps)


def _device(config):
    return None if config.use_cpu_initialization or not torch.cuda.is_available() else torch.cuda.current_device()
