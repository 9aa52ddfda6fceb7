"""Needle cases: exact lengths, the answer where it is said to be, and a pure function of (seed, index)."""

import random

import pytest
from tokenizers import processors

from endprompt.errors import UserError
from endprompt.evaluation.model import load_tokenizer
from endprompt.evaluation.retrieval import CaseBuilder, fingerprint
from endprompt.evaluation.text import SENTENCES, Filler, prefix_tokens, read_documents


@pytest.fixture(params=["built-in", "novel"])
def filler(request, novel) -> Filler:
    return Filler(None if request.param == "built-in" else read_documents([str(novel)]))


@pytest.mark.parametrize("index", range(6))
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_a_case_holds_its_fact_and_asks_for_it(tokenizer, filler, index, depth):
    case = CaseBuilder(tokenizer, filler, seed=5)(index, 1000, depth)
    assert len(case.context) == 1000
    context, question, answer = (tokenizer.decode(ids) for ids in (case.context, case.question, case.answer))
    kind = "number" if index % 2 == 0 else "word"
    fact = question.split("Answer: ")[1].strip()
    assert fact.startswith(f"The magic {kind} for ") and question.startswith("\n\nQuestion: What is the magic ")
    assert context.count(f"{fact} {answer.strip()}.") == 1
    assert (len(answer.strip()) == 7 and answer.strip().isdigit()) if kind == "number" else answer.strip().isalpha()
    assert case.answer[0] == case.context[case.needle]
    assert tokenizer.decode(case.context[case.needle :]).startswith(answer.strip(), answer.startswith(" "))
    assert abs(case.needle / 1000 - depth) < 0.12  # a fact of 45 tokens and half a sentence of up to 150, in this small vocabulary


def test_built_in_sentences_hold_nothing_that_a_question_asks_for():
    text = " ".join(SENTENCES).lower()
    assert "magic" not in text and not any(c.isdigit() for c in text) and len(set(SENTENCES)) == len(SENTENCES)


def test_cases_are_a_pure_function_of_seed_and_index(tokenizer, filler):
    builder = CaseBuilder(tokenizer, filler, seed=5)
    forward = [builder(i, 300, 0.5) for i in range(4)]
    random.seed(99)  # nothing global may matter
    backward = [CaseBuilder(tokenizer, filler, seed=5)(i, 300, 0.5) for i in reversed(range(4))][::-1]
    assert forward == backward and fingerprint(forward) == fingerprint(backward)
    other = [CaseBuilder(tokenizer, filler, seed=6)(i, 300, 0.5) for i in range(4)]
    assert fingerprint(other) != fingerprint(forward) and other[0].context != forward[0].context


def test_depth_moves_the_fact_through_the_same_text(tokenizer, filler):
    builder = CaseBuilder(tokenizer, filler, seed=5)
    shallow, deep = builder(1, 1000, 0.2), builder(1, 1000, 0.6)
    assert shallow.needle < deep.needle and shallow.question == deep.question and shallow.answer == deep.answer
    assert tokenizer.decode(shallow.context)[-40:] == tokenizer.decode(deep.context)[-40:]


def test_no_question_exceeds_the_room_kept_for_it(tokenizer, filler):
    builder = CaseBuilder(tokenizer, filler, seed=5)
    assert max(len(c.question) + len(c.answer) for c in (builder(i, 300, 0.5) for i in range(30))) <= builder.question_room


def test_a_tokenizer_that_adds_bos_gets_it_at_the_start(checkpoint, filler):
    tokenizer = load_tokenizer(checkpoint)
    assert prefix_tokens(tokenizer) == []
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert prefix_tokens(tokenizer) == [tokenizer.bos_token_id]
    case = CaseBuilder(tokenizer, filler, seed=5)(0, 300, 0.0)
    assert len(case.context) == 300 and case.context[0] == tokenizer.bos_token_id and case.context.count(tokenizer.bos_token_id) == 1
    assert case.context[case.needle] == case.answer[0]


def test_built_in_filler_repeats_but_text_does_not(tokenizer, novel):
    assert len(CaseBuilder(tokenizer, Filler(None), 0)(0, 6000, 0.5).context) == 6000
    with pytest.raises(UserError, match="holds .* tokens, a context needs"):
        CaseBuilder(tokenizer, Filler(read_documents([str(novel)])), 0)(0, 60000, 0.5)


@pytest.mark.parametrize(
    "content, message", [(None, "no such text file"), (b"", "holds no text"), (b" \n", "holds no text"), (b"ab\xff", "byte 2")]
)
def test_text_files_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents([str(path)])
