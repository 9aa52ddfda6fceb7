"""The position schemes: small pure functions from a task and random streams to a placement, registered by name.

n = physical_length, L = target_length, p = tokens of the drawn prompt, c = displaced_length. All ranges of random
draws are inclusive, as in the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from endprompt.errors import UserError
from endprompt.positions.randomness import Streams
from endprompt.recipe.schema import Positions

CREAM_SOURCE_FACTOR = 5
"""Text that CREAM reads per sample, in physical lengths (at most L): as much as PoSE's released code reads."""


@dataclass(frozen=True)
class Task:
    """What has to be placed: lengths in tokens, and the recipe's options."""

    physical_length: int
    target_length: int
    prompt_length: int  # 0 under a scheme that appends no prompt
    displaced_length: int  # 0 likewise
    source_length: int
    options: Positions

    @property
    def body_length(self) -> int:
        return self.physical_length - self.prompt_length


@dataclass(frozen=True)
class Placement:
    """position_ids: int64 [n]. text: int64 [body_length], which tokens of the source are the body; None for the first ones."""

    position_ids: np.ndarray
    text: np.ndarray | None = None


Place = Callable[[Task, Streams], Placement]


@dataclass(frozen=True)
class Scheme:
    """A registered scheme."""

    place: Place
    appends_prompt: bool
    source_length: Callable[[Positions, int], int]  # (positions, target_length) -> tokens of text a sample is made from
    check: Callable[[Task], None]  # raises UserError for a task that the scheme cannot place
    fixed: bool  # positions follow from the task alone, nothing is drawn


SCHEMES: dict[str, Scheme] = {}


def _physical_length(positions: Positions, target_length: int) -> int:
    """Every scheme that skips no text reads n tokens, prompt or not, so sample k of all arms starts from the same text."""
    return positions.physical_length


def _anything(task: Task) -> None:
    """No task is impossible."""


def _register(
    name: str, *, appends_prompt: bool, source_length=_physical_length, check=_anything, fixed: bool = False
) -> Callable[[Place], Place]:
    def add(place: Place) -> Place:
        SCHEMES[name] = Scheme(place, appends_prompt, source_length, check, fixed)
        return place

    return add


# ---- EndPrompt and its controls ---------------------------------------------------------------------------------------


def _displaced(task: Task, start: int) -> Placement:
    """Ordinary positions, but the last c tokens from `start` on."""
    n, c = task.physical_length, task.displaced_length
    position_ids = np.arange(n)
    position_ids[n - c :] += start - (n - c)
    return Placement(position_ids)


@_register("endprompt", appends_prompt=True, fixed=True)
def endprompt(task: Task, streams: Streams) -> Placement:
    """Paper eq. 5: p_l = l for l < n-c, p_l = L-c+(l-(n-c)) for the last c tokens.

    The paper displaces the prompt (c = p); the released code c = 20 whatever the prompt, so c > p takes the body's tail
    along and c < p leaves the prompt's head in place.
    """
    return _displaced(task, task.target_length - task.displaced_length)


@_register("endprompt_random", appends_prompt=True)
def endprompt_random(task: Task, streams: Streams) -> Placement:
    """Released `pose_random` (EndPrompt:finetune_suffix_random.py): the last c tokens start at U{n-c .. L-c}."""
    n, c = task.physical_length, task.displaced_length
    return _displaced(task, streams["positions"].integers(n - c, task.target_length - c, endpoint=True))


@_register("short", appends_prompt=True, fixed=True)
def short(task: Task, streams: Streams) -> Placement:
    """The control: the tokens and weights of `endprompt` at ordinary positions 0..n-1."""
    return Placement(np.arange(task.physical_length))


@_register("full", appends_prompt=False, fixed=True)
def full(task: Task, streams: Streams) -> Placement:
    """Full-length fine-tuning: n = L tokens of text at positions 0..L-1."""
    return Placement(np.arange(task.physical_length))


# ---- PoSE -------------------------------------------------------------------------------------------------------------


def _chunk_starts(length: int, task: Task, rng: np.random.Generator) -> list[int]:
    """Where chunks 1..N-1 start in `length` tokens: each chunk takes U{1 .. what leaves one token for each later chunk}.

    That is the rule of the PoSE paper's appendix B for N = 2 and 3. Under first_chunk `half` the first chunk is at most
    (length+1)//2, the rule of the released code (PoSE:src/train_pose.py, N = 2).
    """
    options = task.options.pose
    starts = [0]
    for later in range(options.chunks - 1, 0, -1):
        longest = length - starts[-1] - later
        if options.first_chunk == "half" and len(starts) == 1:
            longest = min(longest, (length + 1) // 2)
        starts.append(starts[-1] + int(rng.integers(1, longest, endpoint=True)))
    return starts[1:]


def _skips(starts: list[int], length: int, highest: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [length]: the skip of each token. Chunk 0 has none, chunk i has u_i ~ U{u_{i-1} .. highest} (PoSE eq. 4, 5)."""
    skips = [0]
    for _ in starts:
        skips.append(int(rng.integers(skips[-1], highest, endpoint=True)))
    return np.repeat(np.array(skips), np.diff([0, *starts, length]))


def _pose_placement(task: Task, chunked: int, streams: Streams) -> Placement:
    """PoSE chunks over the first `chunked` tokens; what follows goes on from the last chunk, in positions and in text."""
    n, body = task.physical_length, task.body_length
    rng = streams["positions"]
    starts = _chunk_starts(chunked, task, rng)
    position_ids = np.arange(n) + _skips(starts, n, task.target_length - n, rng)
    if task.options.pose.content == "contiguous":
        return Placement(position_ids)
    return Placement(position_ids, np.arange(body) + _skips(starts, body, task.source_length - body, streams["text"]))


def _pose_source(positions: Positions, target_length: int) -> int:
    factor = positions.pose.source_factor if positions.pose.content == "uniform" else 1
    return factor * positions.physical_length


def _check_chunks(task: Task, chunked: int) -> None:
    if task.options.pose.chunks > chunked:
        raise UserError(
            "positions.pose.chunks", f"{task.options.pose.chunks} chunks do not fit in the {chunked} tokens they are cut from", "lower it"
        )


def _check_pose(task: Task) -> None:
    _check_chunks(task, task.physical_length)


@_register("pose", appends_prompt=False, source_length=_pose_source, check=_check_pose)
def pose(task: Task, streams: Streams) -> Placement:
    """PoSE (arXiv 2309.10400): N chunks of text at growing skips u_1 <= .. <= u_{N-1} <= L-n.

    With N = 2, first_chunk `half` and content `uniform` this is the released rule: chunk 1 of r1 ~ U{1..(n+1)//2}
    tokens at 0; chunk 2 moved by u ~ U{0..L-n} in positions and by v ~ U{0..source-n} in the text.
    """
    return _pose_placement(task, task.physical_length, streams)


# ---- ET(PoSE): the paper names it and gives no code; three readings ---------------------------------------------------


def _undisplaced_body(task: Task) -> int:
    return task.physical_length - max(task.displaced_length, task.prompt_length)


def _endprompt_pose_source(positions: Positions, target_length: int) -> int:
    return _pose_source(positions, target_length) if positions.endprompt_pose.variant == "A" else positions.physical_length


def _check_endprompt_pose(task: Task) -> None:
    options = task.options.endprompt_pose
    if options.variant == "A":
        _check_chunks(task, _undisplaced_body(task))
    if options.variant == "C" and options.pieces > task.displaced_length:
        raise UserError(
            "positions.endprompt_pose.pieces",
            f"{options.pieces} pieces cannot be cut from a displaced segment of {task.displaced_length} token(s)",
            "lower it, or set positions.displaced_length",
        )


@_register("endprompt_pose", appends_prompt=True, source_length=_endprompt_pose_source, check=_check_endprompt_pose)
def endprompt_pose(task: Task, streams: Streams) -> Placement:
    """PoSE and EndPrompt together.

    Variant A: the undisplaced body is cut into PoSE chunks whose skips are at most L-n, so it ends before L-c, and the
    last c tokens lie at L-c..L-1. Variant B: `endprompt_random`. Variant C: the body stays whole; the last c tokens are
    cut into near-equal pieces at sorted uniform skips in {0..L-n}, the last piece ending at L-1.
    """
    n, c, target = task.physical_length, task.displaced_length, task.target_length
    options = task.options.endprompt_pose
    if options.variant == "A":
        placement = _pose_placement(task, _undisplaced_body(task), streams)
        placement.position_ids[n - c :] = np.arange(target - c, target)
        return placement
    if options.variant == "B":
        return endprompt_random(task, streams)
    skips = np.sort(streams["positions"].integers(0, target - n, size=options.pieces - 1, endpoint=True))
    cuts = np.arange(options.pieces + 1) * c // options.pieces
    position_ids = np.arange(n)
    position_ids[n - c :] += np.repeat([*skips, target - n], np.diff(cuts))
    return Placement(position_ids)


# ---- CREAM and RandPos ------------------------------------------------------------------------------------------------


@lru_cache
def _middle_ends(factor: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """CREAM's truncated Gaussian: its grid x over [2, 2 * factor], 1000 points, and the cumulative probability there."""
    grid = np.linspace(2, 2 * factor, 1000)
    return grid, np.array([0.5 * (1 + math.erf((x - (1 + factor)) / (sigma * math.sqrt(2)))) for x in grid])


def _cream_source(positions: Positions, target_length: int) -> int:
    return min(target_length, CREAM_SOURCE_FACTOR * positions.physical_length)


def _check_cream(task: Task) -> None:
    n, ends = task.physical_length, int(4 * task.target_length / task.physical_length)
    if 2 * ends >= n:
        raise UserError(
            "positions.physical_length",
            f"{n} tokens leave cream no middle between a head and a tail of 4 * target / physical = {ends} tokens",
            f"raise it to at least {math.isqrt(8 * task.target_length) + 1}",
        )


@_register("cream", appends_prompt=False, source_length=_cream_source, check=_check_cream)
def cream(task: Task, streams: Streams) -> Placement:
    """CREAM (bigai-nlco/CREAM:src/train.py): head at 0, tail at the end of the target, a middle whose end is Gaussian.

    f = L/n. Head and tail have n//3 or 4f tokens each, a fair coin for every sample (the release tosses one per 3000).
    r is drawn from the Gaussian N(1+f, sigma) cut to [2, 2f], rounded down; the middle of m tokens ends at
    U{head+(m-1)r/2 .. n*r/2-tail-1}. The tail's text is the source's end. The middle's text has the indices of its
    positions where those lie before the tail's text, else it is the m tokens just before that. (The release compares with
    the whole document's length, which can repeat part of the tail; a source may be shorter than L here, so it matters.)
    """
    n, target, source, rng = task.physical_length, task.target_length, task.source_length, streams["positions"]
    factor = target / n
    ends = n // 3 if rng.integers(2) == 0 else int(4 * factor)
    middle = n - 2 * ends
    grid, cumulative = _middle_ends(factor, task.options.cream.sigma)
    r = int(np.interp(rng.random(), cumulative, grid))
    last = int(rng.integers(math.floor(ends + (middle - 1) * r / 2), math.floor(n * r / 2) - ends - 1, endpoint=True))
    middle_positions = np.arange(last - middle + 1, last + 1)
    head, tail = np.arange(ends), np.arange(target - ends, target)
    tail_text = np.arange(source - ends, source)
    middle_text = middle_positions if last < source - ends else np.arange(source - ends - middle, source - ends)
    return Placement(np.concatenate([head, middle_positions, tail]), np.concatenate([head, middle_text, tail_text]))


@_register("randpos", appends_prompt=False)
def randpos(task: Task, streams: Streams) -> Placement:
    """RandPos (google-deepmind/randomized_positional_encodings): n distinct positions of [0, L), sorted."""
    drawn = streams["positions"].choice(task.target_length, task.physical_length, replace=False, shuffle=False)
    return Placement(np.sort(drawn))
