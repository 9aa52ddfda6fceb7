"""The distance probe: can the model copy a fact from its context when question and fact are d positions apart?

A prompt of a few hundred physical tokens: the context with the fact keeps positions 0..m-1; question and answer move as one
block. d is the relative position between an answer token and its copy in the context, the offset that attention has to
bridge, and is the same for every token of the answer. Nothing but assigned positions changes with d, so the curve isolates
positional generalisation from all else that a long context brings, at the cost of a short prompt.

The context has the same positions at every d: its key/value cache is made once per batch and shared by all distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from endprompt.errors import UserError
from endprompt.evaluation.model import EvaluationModel
from endprompt.evaluation.retrieval import CaseBuilder, RetrievalCase, fingerprint
from endprompt.evaluation.scoring import CaseScore, score_answers, summarise
from endprompt.evaluation.text import Filler

PROMPT_LENGTH = 512
"""Tokens that context, question and answer may take together, and so the smallest distance that is sure to be possible."""

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class DistanceSettings:
    """target_length: assigned positions stay below it; distances: ascending, in tokens; cases: per distance."""

    target_length: int
    distances: tuple[int, ...]
    cases: int
    seed: int


def default_distances(target_length: int) -> tuple[int, ...]:
    """Doubling from PROMPT_LENGTH, and the last one that every case can have: target_length - PROMPT_LENGTH."""
    last = target_length - PROMPT_LENGTH
    doubling = []
    while (following := PROMPT_LENGTH << len(doubling)) < last:
        doubling.append(following)
    return (*doubling, last)


def check_distances(settings: DistanceSettings) -> None:
    """Raise UserError for distances at which some case would overlap its context or leave the target length."""
    last = settings.target_length - PROMPT_LENGTH
    if last < PROMPT_LENGTH:
        raise UserError(
            "--target-length", f"{settings.target_length} is too short", f"the distance probe needs at least {2 * PROMPT_LENGTH}"
        )
    for distance in settings.distances:
        if not PROMPT_LENGTH <= distance <= last:
            raise UserError(
                "--distances",
                f"{distance} lies outside {PROMPT_LENGTH}..{last}",
                f"positions stay below the target length {settings.target_length} and prompts take up to {PROMPT_LENGTH} tokens; "
                "choose other distances or another --target-length",
            )


def build_cases(tokenizer: PreTrainedTokenizerBase, filler: Filler, settings: DistanceSettings) -> list[RetrievalCase]:
    """The same cases for every distance and every model with this tokenizer.

    The fact's depth runs through the golden-ratio sequence: even for any number of cases, and a function of the index alone.
    """
    check_distances(settings)
    builder = CaseBuilder(tokenizer, filler, settings.seed)
    context_length = PROMPT_LENGTH - builder.question_room
    if context_length < PROMPT_LENGTH // 2:
        raise UserError(
            "tokenizer", f"needs {builder.question_room} tokens for a question", f"prompts have {PROMPT_LENGTH}: use a larger vocabulary"
        )
    return [builder(i, context_length, (0.5 + i * _GOLDEN) % 1.0) for i in range(settings.cases)]


def question_start(case: RetrievalCase, distance: int) -> int:
    """Position id of the question's first token that puts the answer `distance` after its copy in the context."""
    return case.needle + distance - len(case.question)


def measure_distance(model: EvaluationModel, cases: list[RetrievalCase], settings: DistanceSettings, batch_size: int, label: str) -> dict:
    """Accuracy and answer NLL of `build_cases` at every distance (`scoring.summarise` each), JSON-ready."""
    scores: dict[int, list[CaseScore]] = {distance: [] for distance in settings.distances}
    with tqdm(total=len(cases) * len(scores), desc=f"{label}: distance", unit="answer", disable=None) as bar:
        for first in range(0, len(cases), batch_size):
            batch = cases[first : first + batch_size]
            context = torch.tensor([case.context for case in batch])
            length = context.shape[1]
            cache = model.prefill(context, torch.arange(length).expand(context.shape))
            for distance, found in scores.items():
                starts = [question_start(case, distance) for case in batch]
                found += score_answers(model, cache, batch, starts)
                bar.update(len(batch))
    return {
        "fingerprint": fingerprint(cases),
        "prompt_tokens": max(len(c.context) + len(c.question) + len(c.answer) for c in cases),
        "distances": [{"distance": distance, **summarise(found)} for distance, found in scores.items()],
    }
