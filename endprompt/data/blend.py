"""Which dataset gives sample k of a blend: a closed rule, exact for any k, that keeps no state.

Dataset d with weight w_d has its i-th sample due at virtual time (i + 1/2) / w_d, and samples come in order of time, the
earlier dataset first where two are due at once. The first K samples do not depend on how many follow, and after any K of
them dataset d, of D with weights that sum to W, has given K w_d / W within 1/2 + (D/2) w_d / W: by time t it has given
t w_d rounded, all together t W within D/2.
"""

from __future__ import annotations

import heapq
import math
from fractions import Fraction


class Blend:
    """weights: positive numbers, taken as the decimals that are written (0.1 is 1/10), so that the rule is exact."""

    def __init__(self, weights: list[float]):
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * scale) for weight in exact]
        self._total = sum(self._weights)
        common = math.lcm(*self._weights)
        self._periods = [common // weight for weight in self._weights]

    def __getitem__(self, k: int) -> tuple[int, int]:
        """(dataset, i): sample k of the blend is sample i of that dataset. k >= 0.

        Before time t dataset d has given ceil(t w_d - 1/2) samples, so all D have given between t W - D/2 and t W + D/2
        for W = sum(w). At t = (2k - D) / 2W that is k - D .. k: jump there, then merge at most D samples.
        """
        count, total = len(self._weights), self._total
        jump = max(0, 2 * k - count)  # t = jump / 2W
        given = [-((total - jump * weight) // (2 * total)) for weight in self._weights]
        due = [((2 * i + 1) * period, d) for d, (i, period) in enumerate(zip(given, self._periods, strict=True))]
        heapq.heapify(due)
        for _ in range(k - sum(given)):
            time, d = due[0]
            given[d] += 1
            heapq.heapreplace(due, (time + 2 * self._periods[d], d))
        d = due[0][1]
        return d, given[d]
