"""Scoring answers by teacher forcing, and what a group of scored cases adds up to.

Every answer token is predicted from the true tokens before it. A case counts as right when each is the arg-max, which is
exactly when greedy generation would write the answer; so nothing has to be generated, and the NLL comes with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from endprompt.evaluation.model import EvaluationModel
from endprompt.evaluation.retrieval import RetrievalCase

Z95 = 1.959964
"""97.5th percentile of the normal distribution: two-sided 95 % intervals."""


@dataclass(frozen=True)
class CaseScore:
    """nll: mean over the answer's tokens, nats; correct: every one of them is the arg-max."""

    nll: float
    correct: bool


def score_answers(model: EvaluationModel, cache: DynamicCache, cases: list[RetrievalCase], starts: list[int]) -> list[CaseScore]:
    """Score one answer per row of a cache that holds the cases' contexts, and leave the cache as it was.

    starts: the position id of each question's first token; the rest follows without gaps. Questions of different lengths are
    padded on the right, where causal attention keeps the padding from being seen.
    """
    # The last answer token predicts nothing that is scored, so it is left out of the input.
    inputs = [case.question + case.answer[:-1] for case in cases]
    width = max(len(row) for row in inputs)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in inputs])
    # Padding repeats the row's last position: running on could leave the target length.
    offsets = torch.stack([torch.arange(width).clamp_(max=len(row) - 1) for row in inputs])
    hidden = model.hidden(tokens, torch.tensor(starts)[:, None] + offsets, cache)
    cache.crop(-width)  # negative: tokens to remove, which transformers 4 and 5 understand alike

    states = [hidden[i, len(c.question) - 1 : len(c.question) - 1 + len(c.answer)] for i, c in enumerate(cases)]
    labels = torch.tensor([token for case in cases for token in case.answer])
    nll, correct = model.score(torch.cat(states), labels)
    lengths = [len(case.answer) for case in cases]
    return [CaseScore(float(a.double().mean()), bool(b.all())) for a, b in zip(nll.split(lengths), correct.split(lengths), strict=True)]


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): stays inside [0, 1] and is not empty at 0 or all."""
    p, z2 = successes / trials, Z95 * Z95
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(p * (1 - p) / trials + z2 / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def summarise(scores: list[CaseScore]) -> dict:
    """JSON-ready numbers of one group of cases.

    accuracy with its 95 % Wilson interval; nll: mean over cases in nats per answer token, with its standard error (None for
    one case); case_correct and case_nll: case by case, for paired comparison.
    """
    n, right = len(scores), sum(s.correct for s in scores)
    low, high = wilson_interval(right, n)
    mean = sum(s.nll for s in scores) / n
    variance = sum((s.nll - mean) ** 2 for s in scores) / (n - 1) if n > 1 else None
    return {
        "cases": n,
        "correct": right,
        "accuracy": right / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "nll": mean,
        "nll_standard_error": None if variance is None else math.sqrt(variance / n),
        "case_correct": [s.correct for s in scores],
        "case_nll": [round(s.nll, 6) for s in scores],
    }
