"""CREAM and RandPos against their released rules, written here once more in the plainest way."""

from collections import defaultdict
from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from tests.positions.making import assert_frequencies, make_builder, text_for

# ---- cream ------------------------------------------------------------------------------------------------------------


def cream_probabilities(n, target, sigma):
    """(head length, end of the middle) -> probability, from the description of the released rule."""
    factor = target / n
    normal = NormalDist(1 + factor, sigma)
    highest = int(2 * factor)
    outcomes = defaultdict(float)
    for ends in (n // 3, int(4 * factor)):
        middle = n - 2 * ends
        for r in range(2, highest + 1):  # the grid stops at 2 and 2f: the tails beyond fall on its first and last point
            below = 0 if r == 2 else normal.cdf(r)
            above = 1 if r == highest else normal.cdf(r + 1)
            places = range(int(ends + (middle - 1) * r / 2), int(r / 2 * n) - ends)
            for last in places:
                outcomes[ends, last] += (above - below) / 2 / len(places)
    return outcomes


def cream_parts(positions, n, target):
    """Tokens in the head (and tail) and the last position of the middle; there is exactly one way to read a layout."""
    found = []
    for ends in {n // 3, 4 * target // n}:
        expected_tail = list(range(target - ends, target))
        middle = positions[ends : n - ends]
        if positions[:ends] == list(range(ends)) and positions[n - ends :] == expected_tail and middle[-1] - middle[0] == len(middle) - 1:
            found.append((ends, middle[-1]))
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(("n", "target", "sigma"), [(48, 144, 3.0), (48, 144, 1.0), (60, 180, 8.0), (60, 150, 3.0)])
def test_cream_follows_the_released_rule(n, target, sigma):
    builder = make_builder("cream", n, target, cream={"sigma": sigma})
    draws = [cream_parts(builder(text_for(builder), index).position_ids.tolist(), n, target) for index in range(5000)]
    assert_frequencies(draws, cream_probabilities(n, target, sigma))


def test_cream_text_lies_at_its_positions_where_the_source_reaches():
    n, target = 108, 864
    builder = make_builder("cream", n, target)
    source = builder.source_length
    assert source == 5 * n  # shorter than the target, so both cases occur
    cases = set()
    for index in range(300):
        sample = builder(text_for(builder), index)
        ends, last = cream_parts(sample.position_ids.tolist(), n, target)
        middle = n - 2 * ends
        reaches = last < source - ends
        begin = last - middle + 1 if reaches else source - ends - middle
        assert sample.tokens.tolist() == list(range(ends)) + list(range(begin, begin + middle)) + list(range(source - ends, source))
        cases.add((ends, reaches))
    assert len(cases) == 4


def test_cream_reads_no_more_text_than_the_target():
    builder = make_builder("cream", 48, 144)
    assert builder.source_length == 144
    for index in range(20):
        sample = builder(text_for(builder), index)
        assert sample.tokens.tolist() == sample.position_ids.tolist()  # all text at its own place


# ---- randpos ----------------------------------------------------------------------------------------------------------


def test_randpos_draws_every_subset_equally_often():
    builder = make_builder("randpos", 8, 11)
    subsets = list(combinations(range(11), 8))
    draws = (tuple(builder(text_for(builder), index).position_ids.tolist()) for index in range(3000))
    assert_frequencies(draws, {subset: 1 / len(subsets) for subset in subsets})


def test_randpos_keeps_the_text_whole():
    builder = make_builder("randpos", 64, 4096)
    sample = builder(text_for(builder), 3)
    assert sample.tokens.tolist() == list(range(64)) and (np.diff(sample.position_ids) >= 1).all()
