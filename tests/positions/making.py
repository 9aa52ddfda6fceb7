"""Builders for tests, and the chi-square test that compares what they draw with what the papers say."""

import math
from collections import Counter

import numpy as np

from endprompt.positions import Prompt, PromptTokens, SampleBuilder
from endprompt.recipe.schema import Positions


def prompt_of(length, name="prompt", weight=1.0):
    """A text prompt whose tokens are 1000, 1001, .., told from any text token of these tests."""
    return Prompt(name, np.arange(1000, 1000 + length), weight)


def make_builder(scheme, physical, target, prompt=3, seed=7, prompts=None, **options):
    """prompt: length of the only prompt, unless `prompts` are given. options: fields of the positions section."""
    positions = Positions(scheme=scheme, physical_length=physical, **options)
    return SampleBuilder(positions, target, PromptTokens(tuple(prompts or [prompt_of(prompt)])), seed)


def text_for(builder):
    """Text whose token ids are their own places in the source, so a sample tells which text it took."""
    return np.arange(builder.source_length)


def assert_frequencies(draws, probabilities, expected_at_least=5):
    """Chi-square: the outcomes in `draws` follow `probabilities` (outcome -> probability), to 5 sigma.

    Outcomes expected fewer than `expected_at_least` times are pooled into one. The draws are deterministic, so this holds
    for good or never.
    """
    draws = list(draws)
    assert set(draws) <= set(probabilities), f"impossible: {sorted(set(draws) - set(probabilities))[:5]}"
    assert abs(sum(probabilities.values()) - 1) < 1e-9
    counts, expected = Counter(), Counter()
    rare = {outcome for outcome, probability in probabilities.items() if probability * len(draws) < expected_at_least}
    for outcome, probability in probabilities.items():
        expected["rare" if outcome in rare else outcome] += probability * len(draws)
    for draw in draws:
        counts["rare" if draw in rare else draw] += 1
    assert len(expected) - len(rare) > 1 and expected["rare"] < 0.5 * len(draws), "too few draws for this test"
    statistic = sum((counts[outcome] - mean) ** 2 / mean for outcome, mean in expected.items() if mean > 0)
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), f"chi-square {statistic:.0f} for {freedom} degrees of freedom"
