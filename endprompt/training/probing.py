"""What the start-up probes of both engines share: a sample with a jump that is wide enough to move what stands behind it."""

from __future__ import annotations

import numpy as np

from endprompt.positions import Sample

CHANGED_TOKENS = 16
"""Body tokens that are replaced at once, spread over the body; outputs looked at: at most as many terminal ones."""


class ProbeFailed(RuntimeError):
    """Attention or positions do not do what the method needs; training would teach nothing, or the wrong thing."""


def with_a_jump(sample: Sample, target_length: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Tokens, positions and the index of the last jump, which is wide enough to move the segment behind it by one.

    Schemes without displacement (`short`, `full`) get one for the probe: the body then starts at position 0 and the last
    quarter ends at the target, or, where the sample fills the target, the last quarter is moved one position on.
    """
    tokens, positions = sample.tokens, sample.position_ids
    jumps = np.flatnonzero(np.diff(positions) > 1) + 1
    if len(jumps) and jumps[-1] < len(tokens) - 1:
        return tokens, positions, int(jumps[-1])
    n, jump = len(tokens), len(tokens) * 3 // 4
    end = max(target_length, n + 1)  # the table has no end; one position beyond a full target costs nothing
    return tokens, np.concatenate([np.arange(jump), np.arange(end - n + jump, end)]), jump
