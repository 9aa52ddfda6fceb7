"""The physical needle test: one fact hidden at a given depth of a really long text, read token by token.

Unlike the distance probe, which only assigns far positions, the model here attends over every token in between, so the test
costs a full prefill per case: (depths x cases) prefills of each length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from endprompt.errors import UserError
from endprompt.evaluation.model import EvaluationModel
from endprompt.evaluation.retrieval import CaseBuilder, RetrievalCase, fingerprint
from endprompt.evaluation.scoring import score_answers, summarise
from endprompt.evaluation.text import Filler


@dataclass(frozen=True)
class NeedleSettings:
    """lengths: tokens of haystack, question and answer together; depths: of the fact, 0 at the start, 1 at the end;
    cases: per length and depth."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cases: int
    seed: int


def build_cases(
    tokenizer: PreTrainedTokenizerBase, filler: Filler, settings: NeedleSettings
) -> dict[tuple[int, float], list[RetrievalCase]]:
    """Cases by (length, depth). A case has the same text, fact and question at every depth, so depths compare on equal terms."""
    builder = CaseBuilder(tokenizer, filler, settings.seed)
    found = {}
    for length in settings.lengths:
        context_length = length - builder.question_room
        if context_length < builder.question_room:
            raise UserError("--needle-lengths", f"{length} is too short", f"use {2 * builder.question_room} or more")
        for depth in settings.depths:
            found[length, depth] = [builder(i, context_length, depth) for i in range(settings.cases)]
    return found


def measure_needle(model: EvaluationModel, cases: dict[tuple[int, float], list[RetrievalCase]], label: str) -> dict:
    """Accuracy and answer NLL per length and depth of `build_cases` (`scoring.summarise` each), JSON-ready."""
    rows = []
    total = sum(len(case.context) for group in cases.values() for case in group)
    with tqdm(total=total, desc=f"{label}: needle", unit="token", unit_scale=True, disable=None) as bar:
        for (length, depth), group in cases.items():
            scores = []
            for case in group:
                cache = DynamicCache()
                for _, hidden in model.stream(torch.tensor([case.context]), torch.arange(len(case.context))[None], cache):
                    bar.update(hidden.shape[1])
                scores += score_answers(model, cache, [case], [len(case.context)])
            rows.append({"length": length, "depth": depth, **summarise(scores)})
    return {"fingerprint": fingerprint([case for group in cases.values() for case in group]), "cells": rows}
