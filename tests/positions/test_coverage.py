"""Coverage against counting every pair, and against the arithmetic of the paper's eq. 8-9."""

import numpy as np
import pytest

from endprompt.positions.coverage import Coverage, count_distances, measure
from tests.positions.making import make_builder, prompt_of, text_for


def count_by_hand(layouts, target):
    counts = [0] * target
    for positions in layouts:
        for query in range(len(positions)):
            for key in range(query + 1):
                counts[positions[query] - positions[key]] += 1
    return counts


def samples_of(builder, count):
    return [builder(text_for(builder), index) for index in range(count)]


@pytest.mark.parametrize(("target", "samples"), [(64, 1), (97, 5), (128, 150)])
def test_counts_are_those_of_all_pairs(target, samples):
    rng = np.random.default_rng(target)
    layouts = [np.sort(rng.choice(target, rng.integers(1, 40), replace=False)) for _ in range(samples)]
    layouts[0] = np.array([0, target - 1])  # the largest distance, which a too short transform would fold onto others
    assert count_distances(layouts, target).tolist() == count_by_hand(layouts, target)


@pytest.mark.parametrize("scheme", ["endprompt", "endprompt_random", "pose", "endprompt_pose", "cream", "randpos", "short"])
def test_counts_of_each_scheme(scheme):
    samples = samples_of(make_builder(scheme, 48, 150), 20)
    coverage = measure(samples, 150, original_length=48)
    by_hand = count_by_hand([sample.position_ids.tolist() for sample in samples], 150)
    assert coverage.counts.tolist() == by_hand
    assert coverage.pairs == 20 * 48 * 49 // 2
    assert coverage.far_pairs == sum(by_hand[48:]) and coverage.shown == sum(count > 0 for count in by_hand)


def test_large_counts_stay_exact():
    """Ordinary positions have n - d pairs at distance d: 130 samples of 32768 tokens, over block borders."""
    n, samples = 32768, 130
    counts = count_distances([np.arange(n)] * samples, 2 * n)
    assert np.array_equal(counts, samples * np.maximum(n - np.arange(2 * n), 0))


def test_the_papers_gap():
    """a = 8172, b = 20, L = 65536: distances 8172..57344 are never shown, 49,173 of them, and a*b pairs are far."""
    builder = make_builder("endprompt", 8192, 65536, prompt=11, displaced_length=20)
    coverage = measure(samples_of(builder, 3), 65536, original_length=8192)
    assert coverage.gaps == [(8172, 57344)]
    assert 57344 - 8172 + 1 == 49173 and coverage.shown == 65536 - 49173
    assert coverage.far_pairs == 3 * 8172 * 20
    assert coverage.as_dict()["gaps"] == [{"first": 8172, "last": 57344, "distances": 49173}]


def test_gaps_follow_equations_8_and_9():
    rng = np.random.default_rng(3)
    for _ in range(60):
        n = int(rng.integers(8, 60))
        b, target = int(rng.integers(1, n)), n + int(rng.integers(0, 200))
        a = n - b
        coverage = measure(samples_of(make_builder("endprompt", n, target, prompt=b), 1), target, original_length=n)
        first, last = max(a, b), target - a - b
        assert coverage.gaps == ([(first, last)] if first <= last else [])


def test_far_predictions_are_the_loss_terms_at_far_states():
    """b - 1 of them (eq. 11): the last far state predicts nothing, so a prompt of one token trains no long distance."""
    for b in (1, 2, 11):
        builder = make_builder("endprompt", 64, 1024, prompt=b)
        assert measure(samples_of(builder, 2), 1024, original_length=64).far_predictions == b - 1
    mixed = make_builder("endprompt", 64, 1024, prompts=[prompt_of(1, "a"), prompt_of(5, "b")])
    samples = samples_of(mixed, 10)
    expected = sum(mixed.draw_prompt(index).length - 1 for index in range(10)) / 10
    assert measure(samples, 1024, original_length=64).far_predictions == pytest.approx(expected)
    untrained = make_builder("endprompt", 64, 1024, prompt=11, prompt_loss_weight=0.0)
    assert measure(samples_of(untrained, 1), 1024, original_length=64).far_predictions == 0
    tail = make_builder("endprompt", 64, 1024, prompt=2, displaced_length=4, prompt_loss_weight=0.0)
    assert measure(samples_of(tail, 1), 1024, original_length=64).far_predictions == 1  # far body token predicts far body token
    border = make_builder("endprompt", 64, 1024, prompt=11)
    assert measure(samples_of(border, 1), 1024, original_length=1024 - 11).far_predictions == 10  # distance = window is far
    short = make_builder("short", 64, 1024, prompt=11)
    assert measure(samples_of(short, 1), 1024, original_length=64).far_predictions == 0


def test_bins_cover_every_distance_once():
    for target in (1, 2, 3, 64, 65, 1000):
        coverage = Coverage(1, target, target, np.arange(1, target + 1), 0.0)
        flat = [distance for first, last in coverage.bins for distance in range(first, last + 1)]
        assert flat == list(range(target))
        rows = coverage.histogram()
        assert sum(row["pairs"] for row in rows) == coverage.pairs and sum(row["shown"] for row in rows) == target


def test_gaps_at_both_ends_and_of_single_distances():
    assert Coverage(1, 8, 8, np.array([0, 0, 3, 0, 1, 1, 0, 0]), 0.0).gaps == [(0, 1), (3, 3), (6, 7)]
    assert Coverage(1, 3, 3, np.array([1, 1, 1]), 0.0).gaps == []
