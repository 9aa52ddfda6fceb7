"""Micro-batches: every sample of a step on exactly one rank, labels shifted, weights summed."""

import numpy as np
import pytest
import torch

from endprompt.data import SampleDataset, write_indexed
from endprompt.data.batches import micro_batch
from endprompt.errors import UserError
from endprompt.recipe.schema import Source
from tests.support.builders import PlainBuilder

LAYOUTS = [(1, 1, 12), (1, 12, 12), (2, 3, 12), (3, 2, 12), (4, 1, 12)]
"""(data_parallel, micro_batch_size, global_batch_size)"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("data") / "d"
    write_indexed(prefix, [np.random.default_rng(0).integers(0, 500, size=3000)], np.uint16)
    return SampleDataset([Source(path=str(prefix))], PlainBuilder(32, 32), seed=1)


def test_fields_against_the_sample(dataset):
    batch = micro_batch(dataset, step=3, micro_step=1, rank=1, data_parallel=2, micro_batch_size=3, global_batch_size=12)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in batch.items()} == {
        "input_ids": (torch.int64, (3, 32)),
        "position_ids": (torch.int64, (3, 32)),
        "labels": (torch.int64, (3, 32)),
        "loss_weights": (torch.float32, (3, 32)),
    }
    for j in range(3):
        sample = dataset[3 * 12 + 1 * 2 * 3 + 1 * 3 + j]
        assert batch["input_ids"][j].tolist() == sample.tokens.tolist()
        assert batch["position_ids"][j].tolist() == sample.position_ids.tolist()
        assert batch["labels"][j, :-1].tolist() == sample.tokens[1:].tolist()
        assert batch["loss_weights"][j].tolist() == [*sample.loss_weights[1:].tolist(), 0.0]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_holds_the_same_samples_for_any_layout(dataset, layout):
    ranks, micro, together = layout
    rows = []
    for step in range(2):
        for micro_step in range(together // (ranks * micro)):
            for rank in range(ranks):
                rows += micro_batch(dataset, step, micro_step, rank, ranks, micro, together)["position_ids"][:, 0].tolist()
    assert rows == [1000 * k for k in range(24)]  # PlainBuilder writes the sample's number there


def test_batches_may_be_changed_in_place(dataset):
    before = micro_batch(dataset, 0, 0, 0, 1, 1, 1)
    before["input_ids"].zero_()
    before["loss_weights"].zero_()
    assert micro_batch(dataset, 0, 0, 0, 1, 1, 1)["input_ids"].any() and dataset[0].loss_weights.any()


def test_sizes_that_do_not_divide(dataset):
    with pytest.raises(UserError, match="training.global_batch_size: 12 is no multiple of micro_batch_size 1 x 5 data-parallel ranks"):
        micro_batch(dataset, 0, 0, 0, 5, 1, 12)
    with pytest.raises(ValueError, match="micro-step 3 of 3"):
        micro_batch(dataset, 0, 3, 0, 2, 2, 12)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        micro_batch(dataset, 0, 0, 2, 2, 2, 12)
