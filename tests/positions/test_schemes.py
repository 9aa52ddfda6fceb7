"""Each scheme against the formula of its paper or released code, written here once more in the plainest way."""

from collections import defaultdict
from typing import get_args

import numpy as np
import pytest

from endprompt.positions.schemes import SCHEMES
from endprompt.recipe.schema import SchemeName
from tests.positions.making import assert_frequencies, make_builder, prompt_of, text_for


def sizes(count, seed):
    """Random (n, p, c, L) with 1 <= p, c < n <= L, corners included."""
    yield from [(8, 1, 1, 8), (8, 7, 7, 8), (8, 7, 1, 9), (8, 1, 7, 4096), (8192, 20, 20, 65536), (8192, 11, 20, 65536)]
    rng = np.random.default_rng(seed)
    for _ in range(count):
        n = int(rng.integers(8, 200))
        yield n, int(rng.integers(1, n)), int(rng.integers(1, n)), n + int(rng.integers(0, 1000))


# ---- endprompt, endprompt_random, short, full -------------------------------------------------------------------------


def test_endprompt_is_equation_5_for_any_lengths():
    for n, p, _, target in sizes(200, seed=0):
        builder = make_builder("endprompt", n, target, prompt=p)
        a, b = n - p, p
        equation_5 = [at if at < a else target - b + (at - a) for at in range(a + b)]
        sample = builder(text_for(builder), 0)
        assert sample.position_ids.tolist() == equation_5
        assert sample.tokens.tolist() == list(range(a)) + list(range(1000, 1000 + b))  # equation 4: y = x ++ e


def test_displaced_length_moves_the_last_tokens_whatever_the_prompt():
    for n, p, c, target in sizes(200, seed=1):
        builder = make_builder("endprompt", n, target, prompt=p, displaced_length=c)
        sample = builder(text_for(builder), 0)
        assert sample.position_ids.tolist() == list(range(n - c)) + list(range(target - c, target))
        assert sample.tokens.tolist() == list(range(n - p)) + list(range(1000, 1000 + p))  # the tokens do not depend on c


def test_each_prompt_is_displaced_by_its_own_length():
    builder = make_builder("endprompt", 32, 256, prompts=[prompt_of(2, "two"), prompt_of(9, "nine")])
    lengths = set()
    for index in range(40):
        p = builder.draw_prompt(index).length
        assert builder(text_for(builder), index).position_ids.tolist() == list(range(32 - p)) + list(range(256 - p, 256))
        lengths.add(p)
    assert lengths == {2, 9}


def random_start(builder, index):
    """Where the displaced segment starts; checks that all else is in place."""
    n, c = builder.positions.physical_length, builder.positions.displaced_length or builder.draw_prompt(index).length
    positions = builder(text_for(builder), index).position_ids
    assert positions[: n - c].tolist() == list(range(n - c))
    assert positions[n - c :].tolist() == list(range(positions[n - c], positions[n - c] + c))
    return int(positions[n - c])


@pytest.mark.parametrize(("scheme", "options"), [("endprompt_random", {}), ("endprompt_pose", {"endprompt_pose": {"variant": "B"}})])
@pytest.mark.parametrize("displaced", [None, 1, 6])
def test_random_segment_starts_uniformly_from_the_body_to_the_end(scheme, options, displaced):
    n, target, p = 16, 40, 4
    c = displaced or p
    builder = make_builder(scheme, n, target, prompt=p, displaced_length=displaced, **options)
    starts = range(n - c, target - c + 1)  # inclusive: no displacement at all, up to ending at L-1
    assert_frequencies((random_start(builder, index) for index in range(1500)), {start: 1 / len(starts) for start in starts})


def test_short_has_endprompts_tokens_and_weights_at_ordinary_positions():
    options = {"prompts": [prompt_of(2, "a"), prompt_of(5, "b")], "displaced_length": 8, "prompt_loss_weight": 0.25}
    short, endprompt = (make_builder(scheme, 32, 256, **options) for scheme in ("short", "endprompt"))
    for index in range(20):
        one, other = short(text_for(short), index), endprompt(text_for(endprompt), index)
        assert one.tokens.tolist() == other.tokens.tolist() and one.loss_weights.tolist() == other.loss_weights.tolist()
        assert one.position_ids.tolist() == list(range(32))


def test_full_is_the_text_as_it_stands():
    builder = make_builder("full", 64, 64)
    sample = builder(text_for(builder), 5)
    assert sample.tokens.tolist() == sample.position_ids.tolist() == list(range(64))


# ---- pose -------------------------------------------------------------------------------------------------------------


def released_pose(n, target, source, first_chunk):
    """Outcome -> probability of the released two-chunk rule, by going through all its draws.

    PoSE:src/train_pose.py in words: the first chunk has r1 tokens; the second ends at r2 of the text and has the rest; its
    positions are moved by u. An outcome is (tokens, positions).
    """
    outcomes = defaultdict(float)
    longest_first = (n + 1) // 2 if first_chunk == "half" else n - 1
    for r1 in range(1, longest_first + 1):
        for r2 in range(n, source + 1):
            for u in range(0, target - n + 1):
                text = list(range(r1)) + list(range(r2 - (n - r1), r2))
                positions = list(range(r1)) + [place + u for place in range(r1, n)]
                outcomes[tuple(text), tuple(positions)] += 1 / (longest_first * (source - n + 1) * (target - n + 1))
    return outcomes


def outcomes_of(builder, count):
    for index in range(count):
        sample = builder(text_for(builder), index)
        yield tuple(sample.tokens.tolist()), tuple(sample.position_ids.tolist())


@pytest.mark.parametrize("first_chunk", ["half", "any"])
@pytest.mark.parametrize("n", [8, 9])
def test_two_chunks_follow_the_released_rule(n, first_chunk):
    target = n + 3
    builder = make_builder("pose", n, target, pose={"first_chunk": first_chunk, "source_factor": 2})
    assert builder.source_length == 2 * n
    assert_frequencies(outcomes_of(builder, 4500), released_pose(n, target, 2 * n, first_chunk))


def test_contiguous_content_skips_positions_only():
    builder = make_builder("pose", 8, 12, pose={"content": "contiguous"})
    assert builder.source_length == 8
    assert_frequencies(outcomes_of(builder, 1500), released_pose(8, 12, 8, "half"))


def test_a_bare_recipe_gets_the_released_settings():
    builder = make_builder("pose", 8, 9)
    assert builder.source_length == 5 * 8
    assert_frequencies(outcomes_of(builder, 4500), released_pose(8, 9, 5 * 8, "half"))


def paper_pose(n, target, chunks):
    """Positions -> probability of PoSE eq. 3-4 with chunk lengths of its appendix B, for any number of chunks."""
    outcomes = defaultdict(float)

    def add_chunk(positions, at, skip, chunk, probability):
        left = chunks - chunk
        lengths = range(1, n - at - (left - 1) + 1) if left > 1 else [n - at]
        skips = range(skip, target - n + 1) if chunk else [0]
        for length in lengths:
            for u in skips:
                placed = positions + tuple(place + u for place in range(at, at + length))
                share = probability / len(lengths) / len(skips)
                if left > 1:
                    add_chunk(placed, at + length, u, chunk + 1, share)
                else:
                    outcomes[placed] += share

    add_chunk((), 0, 0, 0, 1.0)
    return outcomes


@pytest.mark.parametrize(("chunks", "target"), [(3, 10), (4, 9), (8, 9)])
def test_more_chunks_follow_the_paper(chunks, target):
    builder = make_builder("pose", 8, target, pose={"chunks": chunks, "first_chunk": "any", "content": "contiguous"})
    draws = (positions for _, positions in outcomes_of(builder, 6000))
    assert_frequencies(draws, paper_pose(8, target, chunks))


def test_text_of_many_chunks_keeps_order_and_stays_in_the_source():
    builder = make_builder("pose", 64, 512, pose={"chunks": 5, "source_factor": 3})
    highest = 0
    for index in range(200):
        sample = builder(text_for(builder), index)
        assert (np.diff(sample.tokens) >= 1).all() and sample.tokens[0] == 0 and sample.tokens[-1] < 3 * 64
        starts = np.flatnonzero(np.diff(sample.tokens) > 1) + 1
        assert len(starts) <= 4
        highest = max(highest, sample.tokens[-1])
    assert highest > 3 * 64 - 10


def test_text_and_positions_are_cut_at_the_same_places():
    builder = make_builder("pose", 256, 1 << 20, pose={"chunks": 4, "source_factor": 5})
    for index in range(50):
        sample = builder(text_for(builder), index)
        cut_positions = set(np.flatnonzero(np.diff(sample.position_ids) > 1))
        assert set(np.flatnonzero(np.diff(sample.tokens) > 1)) <= cut_positions  # a text skip of 0 leaves no mark


# ---- endprompt_pose ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "displaced"), [(4, None), (4, 4), (4, 9), (9, 4)])
@pytest.mark.parametrize("chunks", [2, 3])
def test_variant_a_is_pose_before_the_far_end(prompt, displaced, chunks):
    n, target = 48, 300
    c = displaced or prompt
    options = {"first_chunk": "half", "content": "uniform", "source_factor": 3, "chunks": chunks}
    builder = make_builder("endprompt_pose", n, target, prompt=prompt, displaced_length=displaced, pose=options)
    ends, firsts = [], []
    for index in range(600):
        sample = builder(text_for(builder), index)
        positions, tokens = sample.position_ids, sample.tokens
        assert positions[n - c :].tolist() == list(range(target - c, target))
        assert positions[0] == 0 and positions[n - c - 1] < target - c  # the body ends before L-c
        cuts = np.flatnonzero(np.diff(positions[: n - c]) > 1) + 1
        assert len(cuts) <= chunks - 1 and (cuts <= n - max(c, prompt) - 1).all()  # no cut inside the prompt or the displaced tail
        assert tokens[n - prompt :].tolist() == list(range(1000, 1000 + prompt))
        assert (np.diff(tokens[: n - prompt]) >= 1).all() and tokens[n - prompt - 1] < builder.source_length
        ends.append(positions[n - c - 1])
        firsts.append(cuts[0] if len(cuts) else 0)
    assert min(ends) < n + 10 and max(ends) > target - c - 10  # anywhere from its own place to just before the prompt
    if chunks == 2:
        assert max(firsts) == (n - max(c, prompt) + 1) // 2  # the released half rule, over the chunked body


def test_variant_c_cuts_the_prompt_and_ends_at_the_end():
    n, target, p, pieces = 24, 33, 5, 3
    builder = make_builder("endprompt_pose", n, target, prompt=p, endprompt_pose={"variant": "C", "pieces": pieces})
    lengths = [1, 2, 2]  # 5 tokens in 3 near-equal pieces
    free = target - n

    def place(first, second):
        skips = np.repeat(sorted([first, second]) + [free], lengths)
        return tuple((np.arange(n - p, n) + skips).tolist())

    probabilities = defaultdict(float)
    for first in range(free + 1):
        for second in range(free + 1):
            probabilities[place(first, second)] += 1 / (free + 1) ** 2
    draws = []
    for index in range(3000):
        positions = builder(text_for(builder), index).position_ids.tolist()
        assert positions[: n - p] == list(range(n - p)) and positions[-1] == target - 1
        draws.append(tuple(positions[n - p :]))
    assert_frequencies(draws, probabilities)


def test_every_scheme_of_the_schema_is_registered():
    assert set(SCHEMES) == set(get_args(SchemeName))
