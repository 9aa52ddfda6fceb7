"""RoPE from given positions in Megatron-Core's GPTModel.

Upstream builds the table from arange and drops `position_ids` for `rope` and `yarn` (NVIDIA/Megatron-LM issue 453), on every
stage. Two functions are replaced:

`GPTModel._preprocess`     The second thing it returns is the table of angles, [s, 1, 1, d] fp32. The replacement lets it run
                           and puts another table there: one row per token, made from position_ids as given, [s, b, 1, d], or
                           [s, 1, 1, d] where all samples of a micro-batch have the same positions. `RotaryEmbedding.forward`,
                           whose lru_cache knows nothing of positions, is asked for nothing.
`apply_rotary_pos_emb`     in megatron.core.transformer.attention. Upstream's own unfused kernel broadcasts [s, b, 1, d]
                           already. The replacement adds what it cannot do: packed `thd` sequences, which upstream indexes by
                           cu_seqlens, an attention factor of ours, and a refusal where a fused kernel would take row 0 for all.

Nothing is sliced here. Under context parallelism position_ids come zig-zag-sliced like the tokens; under sequence parallelism
a rank's queries are gathered to the full sequence before RoPE, so the table is the whole sequence's.

With arange positions angles are the same products as upstream's (one multiplication per number in fp32, no matmul), so
logits and gradients stay equal bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from weakref import WeakSet

import torch

from endprompt.errors import UserError
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies
from megatron_patches.guards import Patch


class RotaryState:
    """What the patched functions follow; set by `megatron_patches.apply`.

    one_layout: every sample of a micro-batch has the same positions, so the table needs no batch dimension.
    scaling: the recipe's rotary embedding, which then takes the place of whatever the model was built with; None keeps that.
    """

    def __init__(self):
        self.one_layout = False
        self.scaling: RopeScaling | None = None
        self._tables: dict[torch.device, torch.Tensor] = {}

    def set(self, *, one_layout: bool, scaling: RopeScaling | None) -> None:
        self.one_layout, self.scaling, self._tables = one_layout, scaling, {}

    def inverse_frequencies(self, rotary: torch.nn.Module, device: torch.device) -> torch.Tensor:
        """fp32 [d / 2] on `device`."""
        if self.scaling is None:
            return inverse_frequencies_of(rotary).to(device)
        if device not in self._tables:
            self._tables[device] = inverse_frequencies(self.scaling).to(device)
        return self._tables[device]

    def attention_factor(self, stock: float) -> float:
        return stock if self.scaling is None else attention_factor(self.scaling)


state = RotaryState()
_checked: WeakSet = WeakSet()


def rotary_angles(rotary: torch.nn.Module, position_ids: torch.Tensor) -> torch.Tensor:
    """Angles for Megatron's rotary kernels: fp32 [s, b, 1, d], or [s, 1, 1, d] where all samples share one layout.

    rotary: the model's RotaryEmbedding or YarnRotaryEmbedding. position_ids: int64 [b, s], s as this rank holds the tokens.
    """
    inverse = state.inverse_frequencies(rotary, position_ids.device)
    rows = position_ids[:1] if state.one_layout else position_ids
    angles = rows.t().float().unsqueeze(-1) * inverse
    doubled = torch.stack((angles, angles), dim=-1).flatten(-2) if rotary.rotary_interleaved else torch.cat((angles, angles), dim=-1)
    return doubled.unsqueeze(2)


def inverse_frequencies_of(rotary: torch.nn.Module) -> torch.Tensor:
    """fp32 [d / 2]: the angles of position 1, which hold every scaling that upstream or a replaced `inv_freq` expresses."""
    table = rotary.get_emb(2)
    table = table[0] if isinstance(table, tuple) else table  # YarnRotaryEmbedding returns (angles, factor)
    row = table[1, 0, 0]
    return row[::2] if rotary.rotary_interleaved else row[: row.numel() // 2]


def _position_driven_preprocess(original: Callable) -> Callable:
    @functools.wraps(original)
    def _preprocess(self, input_ids, position_ids, decoder_input=None, inference_context=None, packed_seq_params=None, **options):
        prepared = original(self, input_ids, position_ids, decoder_input, inference_context, packed_seq_params, **options)
        if inference_context is not None:
            return prepared
        if self not in _checked:
            check_model(self)
            _checked.add(self)
        stock = prepared[1]
        _check_positions(position_ids, stock if packed_seq_params is None else None)
        return (prepared[0], rotary_angles(self.rotary_pos_emb, position_ids), *prepared[2:])

    return _preprocess


def _check_positions(position_ids: torch.Tensor | None, stock: torch.Tensor | None) -> None:
    if position_ids is None:
        raise ValueError(
            "position_ids is None: RoPE follows them, so every pipeline stage must pass them to the model; "
            "use megatron_patches.get_batch, and megatron_patches.is_dataset_built_on_rank so that every stage has the data"
        )
    if stock is not None and position_ids.shape[-1] != stock.shape[0]:
        raise ValueError(
            f"position_ids have {position_ids.shape[-1]} tokens where this rank holds {stock.shape[0]}: "
            "slice them for context parallelism exactly as the tokens (megatron_patches.get_batch does)"
        )


def _position_driven_apply(original: Callable) -> Callable:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    @functools.wraps(original)
    def apply_rotary_pos_emb(t, freqs, config, cu_seqlens=None, mscale=1.0, cp_group=None, **options):
        mscale = state.attention_factor(mscale)
        per_token = cu_seqlens is not None
        if config.apply_rope_fusion and (per_token or freqs.shape[1] > 1 or mscale != 1.0):
            raise UserError(
                "apply_rope_fusion",
                "Transformer Engine's fused rotary kernel takes one table for all samples, without packing or attention factor",
                "set megatron.rope_fusion: false (Megatron-LM: --no-rope-fusion)",
            )
        if not per_token:
            return original(t, freqs, config, cu_seqlens, mscale, cp_group, **options)
        # thd: t is [tokens, h, d] and has one row of angles a token, whatever cu_seqlens and the context-parallel rank are.
        if freqs.shape[0] * freqs.shape[1] != t.shape[0]:
            raise ValueError(f"{t.shape[0]} packed tokens, {freqs.shape[0] * freqs.shape[1]} position ids")
        rows = freqs.transpose(0, 1).reshape(-1, 1, 1, freqs.shape[-1])
        turned = _apply_rotary_pos_emb_bshd(t.unsqueeze(1), rows, rotary_interleaved=config.rotary_interleaved, mscale=mscale)
        return turned.squeeze(1)

    return apply_rotary_pos_emb


def check_model(model: torch.nn.Module) -> None:
    """Raises UserError for a model whose RoPE does not come through the two patched functions."""
    config = model.config
    refusals = {
        "multi_latent_attention": "builds its rotary table inside each layer",
        "fused_single_qkv_rope": "turns queries and keys inside one kernel that takes one table for all samples",
        "enable_cuda_graph": "captures the table of the first micro-batch",
        "external_cuda_graph": "captures the table of the first micro-batch",
        "mtp_num_layers": "shifts position ids for multi-token prediction, which has not been held against a reference",
    }
    for field, reason in refusals.items():
        if getattr(config, field, None):
            raise UserError(f"TransformerConfig.{field}", f"{reason}, so RoPE cannot follow position_ids", "switch it off")
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise UserError("TransformerConfig.cuda_graph_impl", "captures the table of the first micro-batch", "set it to none")
    if model.position_embedding_type not in ("rope", "yarn"):
        raise UserError("position_embedding_type", f"{model.position_embedding_type!r} is not driven by the patch", "use rope or yarn")
    if state.scaling is not None and 2 * len(inverse_frequencies_of(model.rotary_pos_emb)) != state.scaling.head_dim:
        raise UserError("recipe: model", f"has head_dim {state.scaling.head_dim}, the Megatron model has another", "use the recipe's model")


PATCHES = (
    Patch(
        "megatron.core.models.gpt.gpt_model:GPTModel",
        "_preprocess",
        "builds the rotary table from arange and ignores position_ids",
        ("self", "input_ids", "position_ids", "decoder_input", "inference_context", "packed_seq_params"),
        _position_driven_preprocess,
        ("megatron.core.models.gpt.gpt_model:GPTModel", "forward", "_preprocess"),
    ),
    Patch(
        "megatron.core.transformer.attention",
        "apply_rotary_pos_emb",
        "maps packed sequences by cu_seqlens, and fused kernels take one table for all samples",
        ("t", "freqs", "config", "cu_seqlens", "mscale", "cp_group"),
        _position_driven_apply,
        ("megatron.core.transformer.attention:Attention", "forward", "apply_rotary_pos_emb"),
    ),
)
