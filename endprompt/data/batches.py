"""Micro-batches: which samples a rank holds at a step."""

from __future__ import annotations

import numpy as np
import torch

from endprompt.data.samples import SampleDataset
from endprompt.errors import UserError
from endprompt.loss import shift_for_next_token
from endprompt.positions import Sample


def micro_batch(
    dataset: SampleDataset, step: int, micro_step: int, rank: int, data_parallel: int, micro_batch_size: int, global_batch_size: int
) -> dict[str, torch.Tensor]:
    """The samples that data-parallel rank `rank` of `data_parallel` works on in one micro-step, on the CPU.

    Returns, for b = micro_batch_size samples of n tokens: input_ids, position_ids, labels int64 [b, n] and loss_weights
    fp32 [b, n]. labels[:, i] is token i + 1 and loss_weights[:, i] the weight of predicting it; the last is 0.
    Sample j of it is dataset[step * global_batch_size + (micro_step * data_parallel + rank) * micro_batch_size + j], so a
    step holds the same samples whatever the number of ranks. Raises UserError where the sizes do not divide.
    """
    samples = _samples(dataset, step, micro_step, rank, data_parallel, micro_batch_size, global_batch_size)
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    positions = torch.from_numpy(np.stack([sample.position_ids for sample in samples]))
    labels, weights = shift_for_next_token(tokens, torch.from_numpy(np.stack([sample.loss_weights for sample in samples])))
    return {"input_ids": tokens, "position_ids": positions, "labels": labels, "loss_weights": weights}


def _samples(
    dataset: SampleDataset, step: int, micro_step: int, rank: int, data_parallel: int, micro_batch_size: int, global_batch_size: int
) -> list[Sample]:
    micro_steps = _micro_steps(data_parallel, micro_batch_size, global_batch_size)
    if not (0 <= micro_step < micro_steps and 0 <= rank < data_parallel):
        raise ValueError(f"micro-step {micro_step} of {micro_steps}, rank {rank} of {data_parallel}")
    first = step * global_batch_size + (micro_step * data_parallel + rank) * micro_batch_size
    return [dataset[first + j] for j in range(micro_batch_size)]


def _micro_steps(data_parallel: int, micro_batch_size: int, global_batch_size: int) -> int:
    together = micro_batch_size * data_parallel
    if global_batch_size % together:
        raise UserError(
            "training.global_batch_size",
            f"{global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x {data_parallel} data-parallel ranks",
            "change one of them",
        )
    return global_batch_size // together
