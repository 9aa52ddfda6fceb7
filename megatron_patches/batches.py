"""Micro-batches for every rank: nothing is sent from stage to stage, because every rank makes its own.

Upstream's get_batch reads on the first and last pipeline stage only and gives position_ids to the first alone. RoPE needs them
on every stage, so here every rank reads the same sample, a pure function of its number, and takes its context-parallel part.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def context_slice(tensor: torch.Tensor, context_parallel: int, rank: int, dim: int = 1) -> torch.Tensor:
    """This context-parallel rank's part of `tensor` along `dim`: chunks rank and 2 CP - 1 - rank of 2 CP.

    The zig-zag gives every rank the same amount of causal attention. Raises ValueError where 2 CP does not divide.
    """
    if context_parallel == 1:
        return tensor
    if tensor.shape[dim] % (2 * context_parallel):
        raise ValueError(f"{tensor.shape[dim]} tokens cannot be cut into 2 x {context_parallel} chunks for context parallelism")
    chunks = tensor.chunk(2 * context_parallel, dim)
    return torch.cat([chunks[rank], chunks[2 * context_parallel - 1 - rank]], dim)


def get_batch(
    data_iterator: Iterator[dict], vp_stage: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(tokens, labels, loss_mask, attention_mask, position_ids) of the next micro-batch on this rank's device.

    vp_stage: what upstream's scripts pass; every model chunk gets the same batch.

    Takes the place of get_batch in a Megatron-LM script. [b, s / CP] each: int64, loss_mask fp32 with fractional weights;
    attention_mask is None unless the dataset makes one (kernels that are causal by themselves need none).
    """
    from megatron.core import parallel_state

    if data_iterator is None:
        raise ValueError(
            "this rank has no data: build the datasets on every rank "
            "(BlendedMegatronDatasetBuilder(..., megatron_patches.is_dataset_built_on_rank, ...), provider.is_distributed = True)"
        )
    batch = next(data_iterator)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    cut = {key: context_slice(batch[key], size, rank).to(device, non_blocking=True) for key in KEYS}
    mask = batch.get("attention_mask")
    if mask is not None:
        if size > 1:
            raise ValueError("an attention mask cannot be cut for context parallelism: set create_attention_mask to False")
        mask = mask.to(device, non_blocking=True)
    return cut["tokens"], cut["labels"], cut["loss_mask"], mask, cut["position_ids"]


def is_dataset_built_on_rank(*ignored, **also_ignored) -> bool:
    """For BlendedMegatronDatasetBuilder: every rank, every stage. The index files are mapped, so this costs no memory."""
    return True
