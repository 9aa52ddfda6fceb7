"""The distance probe against a plain full forward at the same positions, case by case and distance by distance."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt.errors import UserError
from endprompt.evaluation.distance import (
    PROMPT_LENGTH,
    DistanceSettings,
    build_cases,
    check_distances,
    default_distances,
    measure_distance,
    question_start,
)
from endprompt.evaluation.scoring import CaseScore, score_answers, summarise, wilson_interval
from endprompt.evaluation.text import Filler

SETTINGS = DistanceSettings(target_length=8192, distances=(512, 3000, 8192 - PROMPT_LENGTH), cases=5, seed=11)


@pytest.fixture(scope="module")
def cases(tokenizer):
    return build_cases(tokenizer, Filler(None), SETTINGS)


@pytest.fixture(scope="module")
def result(model, cases):
    return measure_distance(model, cases, SETTINGS, 2, "tiny")


def positions_of(case, distance: int) -> torch.Tensor:
    """Written from the definition: the context from 0, then a block that puts each answer token `distance` after its copy."""
    moved = len(case.question) + len(case.answer)
    first_answer = case.needle + distance
    return torch.cat([torch.arange(len(case.context)), torch.arange(moved) + first_answer - len(case.question)])


def test_probe_equals_a_plain_forward_at_the_same_positions(cases, result, plain_logits):
    for row in result["distances"]:
        for case, nll, correct in zip(cases, row["case_nll"], row["case_correct"], strict=True):
            tokens = torch.tensor(case.context + case.question + case.answer)
            predicting = plain_logits(tokens, positions_of(case, row["distance"]))[-len(case.answer) - 1 : -1]
            labels = torch.tensor(case.answer)
            assert nll == pytest.approx(torch.nn.functional.cross_entropy(predicting, labels).item(), abs=2e-5)
            assert correct == bool((predicting.argmax(dim=1) == labels).all())


def test_distance_matters_and_is_the_offset_between_answer_and_copy(cases, result):
    near, middle, far = (row["nll"] for row in result["distances"])
    assert len({round(near, 4), round(middle, 4), round(far, 4)}) == 3
    for case in cases:
        positions = positions_of(case, 3000)
        assert question_start(case, 3000) == positions[len(case.context)]
        answer = positions[len(case.context) + len(case.question) :]
        copy = positions[case.needle : case.needle + len(case.answer)]
        assert set((answer - copy).tolist()) == {3000}


def test_positions_fill_the_target_but_never_leave_it(model, tokenizer, monkeypatch):
    """Every position that the model meets, padding included; questions start after their context."""
    seen = []
    plain = type(model).hidden

    def spy(self, tokens, position_ids, cache=None):
        seen.append((position_ids.min().item(), position_ids.max().item()))
        return plain(self, tokens, position_ids, cache)

    monkeypatch.setattr(type(model), "hidden", spy)
    settings = dataclasses.replace(SETTINGS, distances=(PROMPT_LENGTH, default_distances(8192)[-1]), cases=8)
    cases = build_cases(tokenizer, Filler(None), settings)
    deepest = max(range(8), key=lambda i: cases[i].needle)
    # Answers of one and of seven tokens in one batch: the short row is padded, at the far end of the target.
    cases[deepest] = dataclasses.replace(cases[deepest], answer=cases[deepest].answer[:1])
    measure_distance(model, cases, settings, 8, "tiny")
    (first, last), (near, _), (_, end) = seen
    assert (first, last) == (0, len(cases[0].context) - 1) and near > last
    assert 8192 - PROMPT_LENGTH < end < 8192
    ends = [question_start(c, settings.distances[1]) + len(c.question) + len(c.answer) - 2 for c in cases]
    assert end == max(ends)


def test_batch_size_does_not_change_the_result(model, cases, result):
    alone = measure_distance(model, cases, SETTINGS, 1, "tiny")
    for row, other in zip(result["distances"], alone["distances"], strict=True):
        assert row["case_nll"] == pytest.approx(other["case_nll"], abs=2e-5)
    assert alone["fingerprint"] == result["fingerprint"]


def test_same_cases_whatever_the_distances_and_their_number(tokenizer, cases):
    other = build_cases(tokenizer, Filler(None), dataclasses.replace(SETTINGS, distances=(777,), cases=3))
    assert other == cases[:3]


def test_facts_stand_at_spread_depths(tokenizer):
    needles = sorted(case.needle for case in build_cases(tokenizer, Filler(None), dataclasses.replace(SETTINGS, cases=16)))
    assert needles[0] < 100 and needles[-1] > 300


def test_an_answer_is_correct_only_when_greedy_generation_writes_it(model, cases, checkpoint):
    """A random model retrieves nothing, so its own greedy continuation stands in for the answer."""
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    batch = []
    for case in cases[:2]:
        prompt = torch.tensor([case.context + case.question])
        written = reference.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=2)[
            0, prompt.shape[1] :
        ].tolist()
        batch.append(dataclasses.replace(case, answer=written))
    batch[1] = dataclasses.replace(batch[1], answer=[*batch[1].answer[:3], (batch[1].answer[3] + 1) % 512])
    contexts = torch.tensor([case.context for case in batch])
    length = contexts.shape[1]
    cache = model.prefill(contexts, torch.arange(length).expand(contexts.shape))
    scores = score_answers(model, cache, batch, [length, length])
    assert [score.correct for score in scores] == [True, False]
    assert cache.get_seq_length() == length and score_answers(model, cache, batch, [length, length]) == scores


def test_default_distances_double_up_to_the_end_of_the_target():
    assert default_distances(65536) == (512, 1024, 2048, 4096, 8192, 16384, 32768, 65024)
    assert default_distances(1024) == (512,)
    for target in (1024, 3000, 65536, 262144):
        check_distances(DistanceSettings(target, default_distances(target), 1, 0))


@pytest.mark.parametrize(
    "target, distances, message",
    [
        (1000, (512,), "--target-length: 1000 is too short"),
        (8192, (511,), "511 lies outside 512..7680"),
        (8192, (512, 8000), "8000 lies outside"),
    ],
)
def test_impossible_distances(target, distances, message):
    with pytest.raises(UserError, match=message):
        check_distances(DistanceSettings(target, distances, 1, 0))


def test_wilson_interval_against_published_values():
    assert wilson_interval(0, 16) == pytest.approx((0.0, 0.1936), abs=1e-4)
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(16, 16) == pytest.approx((0.8064, 1.0), abs=1e-4)


def test_summary_of_scores(result):
    row = result["distances"][1]
    mean = sum(row["case_nll"]) / 5
    deviation = math.sqrt(sum((x - mean) ** 2 for x in row["case_nll"]) / 4)
    assert row["cases"] == 5 and row["correct"] == sum(row["case_correct"]) and row["accuracy"] == row["correct"] / 5
    assert row["nll"] == pytest.approx(mean, abs=1e-5)
    assert row["nll_standard_error"] == pytest.approx(deviation / math.sqrt(5), abs=1e-5)
    assert summarise([CaseScore(1.0, True)])["nll_standard_error"] is None
