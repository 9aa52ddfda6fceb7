"""Which relative distances a scheme shows to attention, and how often: exact counts over samples.

A pair is a query and a key that is not physically later (the query itself included, at distance 0), as causal attention
sees them; its distance is the difference of their position ids. n tokens make n(n+1)/2 pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from endprompt.positions.sample import Sample

_BLOCK = 64
"""Samples summed as spectra before going back to counts. The spectrum of n positions reaches n^2 and a double holds 2^-53
of that, so a block at n = 262144 errs by about 64 * 2^36 * 2^-53 = 5e-4 of a count: rounding is exact."""


def count_distances(layouts: Iterable[np.ndarray], target_length: int) -> np.ndarray:
    """int64 [target_length]: at d, the number of pairs at distance d over all layouts.

    layouts: increasing position ids, int [n], in [0, target_length). As they increase, the pairs at distance d are the
    positions x for which x and x+d are both taken: the autocorrelation of the taken positions, by FFT in O(L log L)
    instead of O(n^2). 2L points hold all of it without wrapping round.
    """
    counts = np.zeros(target_length, dtype=np.int64)
    power = np.zeros(target_length + 1)

    def flush() -> None:
        exact = np.fft.irfft(power, 2 * target_length)[:target_length]
        rounded = np.rint(exact)
        if np.abs(exact - rounded).max() > 0.25:
            raise RuntimeError("the transform lost precision: counts would be wrong")
        counts[:] += rounded.astype(np.int64)
        power[:] = 0

    for number, position_ids in enumerate(layouts, start=1):
        taken = np.zeros(2 * target_length)
        taken[position_ids] = 1
        spectrum = np.fft.rfft(taken)
        power += spectrum.real**2 + spectrum.imag**2
        if number % _BLOCK == 0:
            flush()
    flush()
    return counts


@dataclass(frozen=True)
class Coverage:
    """The distances that `samples` samples showed. Lengths and distances in tokens.

    counts: int64 [target_length], pairs at each distance, summed over the samples.
    far_predictions: mean number per sample of loss terms (weight > 0) whose query is at least original_length from the
        sample's first token. It can be 0 where far pairs exist: the last token sees far keys and predicts nothing.
    """

    samples: int
    target_length: int
    original_length: int
    counts: np.ndarray
    far_predictions: float

    @property
    def pairs(self) -> int:
        return int(self.counts.sum())

    @property
    def shown(self) -> int:
        """Distances of [0, target_length) that occur at least once."""
        return int(np.count_nonzero(self.counts))

    @property
    def far_pairs(self) -> int:
        """Pairs at distances the original window cannot hold: original_length and above."""
        return int(self.counts[self.original_length :].sum())

    @cached_property
    def gaps(self) -> list[tuple[int, int]]:
        """Ranges (first, last), both inclusive, of distances that never occur."""
        unseen = np.concatenate([[0], self.counts == 0, [0]])
        edges = np.flatnonzero(np.diff(unseen))
        return [(int(first), int(end) - 1) for first, end in edges.reshape(-1, 2)]

    @property
    def bins(self) -> list[tuple[int, int]]:
        """Ranges (first, last) that double in width: 0, 1, 2-3, 4-7, .. up to the last distance."""
        firsts = [0, *(2**power for power in range((self.target_length - 1).bit_length()))]
        return [(first, end - 1) for first, end in zip(firsts, [*firsts[1:], self.target_length], strict=True)]

    def histogram(self) -> list[dict[str, int]]:
        """Pairs and distances shown in each of `bins`."""
        rows = []
        for first, last in self.bins:
            part = self.counts[first : last + 1]
            rows.append({"first": first, "last": last, "pairs": int(part.sum()), "shown": int(np.count_nonzero(part))})
        return rows

    def as_dict(self) -> dict:
        """The numbers, ready for JSON."""
        return {
            "samples": self.samples,
            "pairs": self.pairs,
            "distances_shown": self.shown,
            "share_shown": self.shown / self.target_length,
            "gaps": [{"first": first, "last": last, "distances": last - first + 1} for first, last in self.gaps],
            "far_pairs": self.far_pairs,
            "far_pair_share": self.far_pairs / self.pairs,
            "far_predictions_per_sample": self.far_predictions,
            "histogram": self.histogram(),
        }


def measure(samples: list[Sample], target_length: int, original_length: int) -> Coverage:
    """The coverage of `samples` (at least one)."""
    counts = count_distances((sample.position_ids for sample in samples), target_length)
    far = 0
    for sample in samples:
        predicts = sample.loss_weights[1:] > 0
        far += np.count_nonzero(predicts & (sample.position_ids[:-1] - sample.position_ids[0] >= original_length))
    return Coverage(len(samples), target_length, original_length, counts, far / len(samples))
