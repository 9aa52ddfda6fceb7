"""Samples: pure in (seed, k), every chunk once an epoch, blended as weighted, and refused where the data does not fit."""

import json
import multiprocessing
import random

import numpy as np
import pytest

from endprompt.data import SampleDataset, write_indexed
from endprompt.errors import UserError
from endprompt.positions import SampleBuilder, tokenize_prompts
from endprompt.recipe.schema import Positions, Source
from tests.support.builders import PlainBuilder
from tests.support.preparation import samples_in_another_process

LENGTH = 16


def plain(source_length=LENGTH, physical_length=LENGTH):
    return PlainBuilder(source_length, physical_length)


@pytest.fixture
def stream(tmp_path):
    """A dataset whose token i is i: a sample's text tells its place."""
    write_indexed(tmp_path / "d", [np.arange(70), np.arange(70, 1000)], np.uint16)
    return Source(path=str(tmp_path / "d"))


def chunk_order(starts):
    """Which chunk each sample is, whatever the offset of the cuts."""
    return tuple(np.argsort(np.argsort(starts)).tolist())


@pytest.mark.parametrize("seed", [0, 1, 2**70])
def test_an_epoch_visits_every_chunk_once(stream, seed):
    dataset = SampleDataset([stream], plain(), seed)
    per_epoch = dataset.samples_per_epoch
    assert per_epoch == 1000 // LENGTH == 62
    orders = []
    for epoch in range(4):
        starts = [int(dataset[epoch * per_epoch + j].tokens[0]) for j in range(per_epoch)]
        seen = np.concatenate([dataset[epoch * per_epoch + j].tokens for j in range(per_epoch)])
        assert len(np.unique(seen)) == len(seen) == 62 * LENGTH  # no token twice, so no chunk twice
        orders.append(starts)
    assert len({min(order) for order in orders}) > 1  # the cuts move from epoch to epoch
    assert len({chunk_order(order) for order in orders}) == 4  # and the chunks come in another order
    assert tuple(range(62)) not in map(chunk_order, orders)


def test_text_runs_on_past_the_chunk_and_around_the_end(stream):
    dataset = SampleDataset([stream], plain(source_length=5 * LENGTH), seed=3)
    short = SampleDataset([stream], plain(), seed=3)
    wrapped = 0
    for k in range(2 * dataset.samples_per_epoch):
        tokens = dataset[k].tokens
        assert np.array_equal(tokens, (tokens[0] + np.arange(5 * LENGTH)) % 1000)
        assert tokens[0] == short[k].tokens[0]  # the same text for every scheme
        wrapped += tokens[-1] < tokens[0]
    assert wrapped > 0


def test_random_access_in_any_order_and_process(stream):
    dataset = SampleDataset([stream], plain(), seed=5)
    places = list(range(200))
    forward = [dataset[k].tokens.tolist() for k in places]
    random.Random(0).shuffle(places)
    again = SampleDataset([stream], plain(), seed=5)
    assert all(again[k].tokens.tolist() == forward[k] for k in places)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(samples_in_another_process, (stream.path, LENGTH, 5, 200)) == forward
    assert [SampleDataset([stream], plain(), seed=6)[k].tokens.tolist() for k in range(200)] != forward


def test_blend_counts_and_epochs(tmp_path):
    for name, first, size in (("a", 0, 160), ("b", 1000, 1600)):
        write_indexed(tmp_path / name, [np.arange(first, first + size)], np.uint16)
    sources = [Source(path=str(tmp_path / "a"), weight=0.25), Source(path=str(tmp_path / "b"), weight=0.75)]
    dataset = SampleDataset(sources, plain(), seed=0)
    assert dataset.samples_per_epoch == 10 + 100
    firsts = [int(dataset[k].tokens[0]) for k in range(400)]
    assert sum(first < 1000 for first in firsts) == 100
    for k in range(4, 401, 4):
        assert sum(first < 1000 for first in firsts[:k]) == k // 4
    small = [dataset[k].tokens for k, first in enumerate(firsts) if first < 1000]
    for epoch in range(10):  # the small source comes round ten times, each time whole
        assert len(np.unique(np.concatenate(small[10 * epoch : 10 * epoch + 10]))) == 160


def test_the_same_text_under_two_names_is_read_in_two_orders(stream):
    dataset = SampleDataset([stream, stream], plain(), seed=0)
    even, odd = ([dataset[k].tokens[0] for k in range(start, 124, 2)] for start in (0, 1))
    assert chunk_order(even) != chunk_order(odd)


def test_fingerprint_follows_content_and_weights(tmp_path, stream):
    def fingerprint(*sources):
        return SampleDataset(list(sources), plain(), 0).fingerprint()

    same = fingerprint(stream)
    assert same == fingerprint(stream) and len(same) == 16
    write_indexed(tmp_path / "e", [np.arange(70), np.arange(70, 1000)], np.uint16)
    copy = Source(path=str(tmp_path / "e"))
    assert fingerprint(copy) == same  # where the data lies does not matter
    assert fingerprint(stream, copy) != same
    assert fingerprint(stream, Source(path=copy.path, weight=2)) != fingerprint(stream, copy)
    write_indexed(tmp_path / "e", [np.arange(70), np.arange(70, 999), np.array([7])], np.uint16)
    assert fingerprint(copy) != same
    write_indexed(tmp_path / "e", [np.arange(70), np.append(np.arange(70, 999), 7)], np.uint16)
    assert fingerprint(copy) != same


@pytest.mark.parametrize(("builder", "needed"), [(plain(physical_length=1001), 1001), (plain(source_length=1001), 1001)])
def test_a_source_shorter_than_a_sample(stream, builder, needed):
    with pytest.raises(UserError, match=f"d: has 1000 tokens, one sample reads {needed}; prepare more text or lower"):
        SampleDataset([stream], builder, 0)


def test_a_source_of_exactly_one_sample(stream):
    dataset = SampleDataset([stream], plain(1000, 1000), 0)
    assert dataset.samples_per_epoch == 1
    assert sorted(dataset[0].tokens) == sorted(dataset[1].tokens) == list(range(1000))


def test_tokens_outside_of_the_vocabulary(tmp_path, stream):
    assert SampleDataset([stream], plain(), 0, vocab_size=1000)[0]
    dataset = SampleDataset([stream], plain(), 0, vocab_size=999)
    with pytest.raises(UserError, match="d: holds token 999, the model's vocabulary has 999; prepare the data"):
        for k in range(10 * dataset.samples_per_epoch):  # an epoch leaves out 1000 % 16 tokens, others each time
            dataset[k]
    # With a sidecar it is known when the dataset is opened, with the tokenizer's name.
    (tmp_path / "d.json").write_text(json.dumps({"max_token_id": 999, "tokenizer": {"name": "other-model"}}))
    with pytest.raises(UserError, match=r"holds token 999, .* 999 \(made with tokenizer other-model, says .*d\.json\)"):
        SampleDataset([stream], plain(), 0, vocab_size=999)
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(UserError, match=r"d\.json: is not the sidecar of a dataset"):
        SampleDataset([stream], plain(), 0)


def test_negative_tokens(tmp_path):
    write_indexed(tmp_path / "d", [np.full(100, -1)], np.int32)
    dataset = SampleDataset([Source(path=str(tmp_path / "d"))], plain(), 0, vocab_size=10)
    with pytest.raises(UserError, match="holds token -1"):
        dataset[0]
    with pytest.raises(IndexError):
        dataset[-1]


@pytest.mark.parametrize("scheme", ["endprompt", "endprompt_random", "pose", "endprompt_pose", "cream", "randpos", "short", "full"])
def test_real_schemes(tmp_path, tokenizer_folder, scheme):
    from transformers import AutoTokenizer

    write_indexed(tmp_path / "d", [np.arange(4000) % 500], np.uint16)
    physical, target = (256, 256) if scheme == "full" else (64, 256)
    positions = Positions(scheme=scheme, physical_length=physical)
    prompts = tokenize_prompts(positions, AutoTokenizer.from_pretrained(tokenizer_folder))
    dataset = SampleDataset([Source(path=str(tmp_path / "d"))], SampleBuilder(positions, target, prompts, 0), 0, vocab_size=512)
    again = SampleDataset([Source(path=str(tmp_path / "d"))], SampleBuilder(positions, target, prompts, 0), 0, vocab_size=512)
    for k in (0, 70, 5, 10**6):
        sample, same = dataset[k], again[k]
        assert len(sample.tokens) == len(sample.position_ids) == len(sample.loss_weights) == physical
        assert sample.position_ids.max() < target
        for field in ("tokens", "position_ids", "loss_weights"):
            assert np.array_equal(getattr(sample, field), getattr(same, field))
