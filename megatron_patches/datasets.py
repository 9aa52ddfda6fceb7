"""Megatron's GPTDataset yields the recipe's samples: text from upstream's index, positions and weights from `endprompt`.

Upstream hands out one cached `position_ids` tensor, arange, for all samples. The replaced `__getitem__` asks upstream's own
index for the text of sample `idx` and lets `SampleBuilder` make tokens, positions and fractional loss weights of it, a pure
function of (text, seed, idx), in tensors that no other sample shares. Upstream's blending, splitting, caching on disk and
consumed-samples resume stay what they are.

The training entry point of this project reads `endprompt.data.SampleDataset` instead, which is the same on DeepSpeed; this
patch is for people who run their own Megatron-LM script.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from endprompt.errors import UserError
from endprompt.loss import shift_for_next_token
from endprompt.positions import SampleBuilder
from megatron_patches.guards import Patch


class DatasetState:
    """builder: makes the samples; None leaves upstream's samples as they are."""

    builder: SampleBuilder | None = None


state = DatasetState()


def _building_getitem(original: Callable) -> Callable:
    @functools.wraps(original)
    def __getitem__(self, idx):
        builder = state.builder
        if builder is None:
            return original(self, idx)
        check_dataset(self.config, builder)
        text = torch.from_numpy(self._query_document_sample_shuffle_indices(idx or 0)[0]).long()[: builder.source_length]
        padding = text == self._pad_token_id
        text[padding] = 0
        sample = builder(text.numpy(), idx or 0)
        tokens = torch.from_numpy(sample.tokens)
        labels, weights = shift_for_next_token(tokens, torch.from_numpy(sample.loss_weights))
        if self.config.eod_mask_loss:
            weights[tokens == self.config.tokenizer.eod] = 0
        if padding.any() or idx is None:  # the last, partial sequence of a validation split, and samples that only fill a batch
            weights.zero_()
        item = {"tokens": tokens, "labels": labels, "loss_mask": weights, "position_ids": torch.from_numpy(sample.position_ids)}
        if self.config.create_attention_mask:  # True hides; physical order, whatever the positions
            n = len(tokens)
            item["attention_mask"] = torch.ones(1, n, n, dtype=torch.bool).triu(1)
        return item

    return __getitem__


def check_dataset(config, builder: SampleBuilder) -> None:
    """Raises UserError where the dataset's settings contradict the recipe's samples. config: GPTDatasetConfig."""
    if config.sequence_length != builder.positions.physical_length:
        raise UserError(
            "Megatron's sequence_length",
            f"{config.sequence_length} is not the recipe's positions.physical_length {builder.positions.physical_length}",
            f"set --seq-length {builder.positions.physical_length}",
        )
    if builder.source_length > config.sequence_length:
        raise UserError(
            "positions",
            f"scheme {builder.positions.scheme} makes a sample from {builder.source_length} tokens of text, GPTDataset gives "
            f"{config.sequence_length}",
            "set positions.pose.content: contiguous, or train with python -m megatron_patches.train",
        )
    for field in ("reset_position_ids", "reset_attention_mask", "inter_document_masking"):
        if getattr(config, field, None):
            raise UserError(
                f"GPTDatasetConfig.{field}", "would cut a sample at document ends: the terminal prompt must see the body", "switch it off"
            )


PATCHES = (
    Patch(
        "megatron.core.datasets.gpt_dataset:GPTDataset",
        "__getitem__",
        "gives every sample the same cached arange as position_ids and whole numbers as loss mask",
        ("self", "idx"),
        _building_getitem,
        ("megatron.core.datasets.gpt_dataset:GPTDataset", "__getitem__", "_query_document_sample_shuffle_indices"),
    ),
)
