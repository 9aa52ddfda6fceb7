"""The blend rule against its definition: sort every due time, exactly."""

import random
from fractions import Fraction

import pytest

from endprompt.data.blend import Blend
from endprompt.data.shuffle import Permutation, hash_numbers, key_of, splitmix64

WEIGHTS = [[1], [1, 1], [0.7, 0.3], [3, 1, 1, 0.5], [0.1, 0.2, 0.7], [1e-3, 1, 1000], [0.123456789, 3.14159265358979, 2.5e-7, 1, 1]]


def by_sorting(weights, count):
    """The first `count` samples: all (time, dataset, i), sorted."""
    exact = [Fraction(str(weight)) for weight in weights]
    due = [((i + Fraction(1, 2)) / weight, d, i) for d, weight in enumerate(exact) for i in range(count)]
    return [(d, i) for _, d, i in sorted(due)[:count]]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_rule_equals_its_definition(weights):
    blend = Blend(weights)
    assert [blend[k] for k in range(300)] == by_sorting(weights, 300)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_proportions_hold_after_any_number_of_samples(weights):
    blend, counts, total = Blend(weights), [0] * len(weights), sum(weights)
    for k in range(3000):
        d, i = blend[k]
        assert i == counts[d]  # every sample of a dataset once and in order
        counts[d] += 1
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - (k + 1) * weight / total) <= 0.5 + len(weights) / 2 * weight / total + 1e-9


def test_decimal_weights_repeat_exactly():
    blend = Blend([0.1, 0.2, 0.7])
    for block in range(50):
        drawn = [blend[10 * block + k][0] for k in range(10)]
        assert [drawn.count(d) for d in range(3)] == [1, 2, 7]


def test_far_samples_need_no_steps_before_them():
    blend = Blend([0.7, 0.3])
    k = 10**15
    assert blend[k] in ((0, 7 * 10**14), (1, 3 * 10**14))
    drawn = [blend[k + j][0] for j in range(10)]
    assert drawn.count(0) == 7


def test_scale_of_weights_does_not_matter():
    assert [Blend([7, 3])[k] for k in range(200)] == [Blend([0.7, 0.3])[k] for k in range(200)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1023, 4096, 5000])
def test_permutation_visits_every_place_once(size):
    for key in (0, 1, 2**64 - 1):
        order = Permutation(size, key)
        assert sorted(order[place] for place in range(size)) == list(range(size))
    with pytest.raises(IndexError):
        order[size]


def test_permutation_is_not_biased():
    """Over keys, every number comes to every place equally often: chi-square with 9 x 9 degrees, 99.99 % below 136."""
    size, keys = 10, 4000
    counts = [[0] * size for _ in range(size)]
    for seed in range(keys):
        order = Permutation(size, key_of(f"test {seed}"))
        for place in range(size):
            counts[place][order[place]] += 1
    expected = keys / size
    assert sum((count - expected) ** 2 / expected for row in counts for count in row) < 136


def test_permutation_breaks_up_neighbours():
    order = Permutation(10_000, key_of("x"))
    found = [order[place] for place in range(10_000)]
    assert sum(abs(a - b) == 1 for a, b in zip(found, found[1:], strict=False)) < 12  # 2 expected


def test_splitmix64_reference_values():
    """First outputs of Vigna's splitmix64.c for seed 1234567 (state advances by the golden gamma)."""
    golden, state = 0x9E3779B97F4A7C15, 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [splitmix64((state + i * golden) % 2**64) for i in range(5)] == expected


def test_vectorised_hash_equals_the_scalar_one():
    key = key_of("some purpose")
    assert hash_numbers("some purpose", 50).tolist() == [splitmix64(key ^ i) for i in range(50)]
    assert len({key_of(str(random.random())) for _ in range(100)}) == 100
