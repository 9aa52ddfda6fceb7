"""Preparation against the tokenizer called by hand; the same bytes from any number of workers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from endprompt.data import open_indexed
from endprompt.data import prepare as preparation
from endprompt.data.corpus import TextOptions
from endprompt.data.indexed import dtype_for
from endprompt.data.merge import Split
from endprompt.data.prepare import prepare
from endprompt.data.shuffle import key_of, splitmix64
from endprompt.errors import UserError
from tests.support.corpora import make_texts, write_jsonl
from tests.support.preparation import job_for


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(preparation, "SHARD_BYTES", (4000, 4000))


@pytest.fixture
def corpus(tmp_path):
    """A folder with every type of file, and its documents in order; the third and the last are empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = make_texts(60)
    texts[2], texts[-1] = " \n", ""
    (folder / "0.txt").write_text(texts[0], encoding="utf-8")
    (folder / "1.txt").write_text(texts[1], encoding="utf-8")
    write_jsonl(folder / "2.jsonl", texts[2:])
    return folder, texts


def by_hand(texts, tokenizer_folder, bos=False, eos=True):
    """Documents of token ids as transformers gives them, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    before, after = [tokenizer.bos_token_id] * bos, [tokenizer.eos_token_id] * eos
    return [before + tokenizer(text, add_special_tokens=False)["input_ids"] + after for text in texts if text.strip()]


def documents_of(prefix):
    text = open_indexed(prefix)
    return [text.document(i).tolist() for i in range(len(text))]


def files_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize(("bos", "eos"), [(False, True), (True, True), (True, False)])
def test_tokens_and_document_boundaries(corpus, tokenizer_folder, small_shards, bos, eos):
    folder, texts = corpus
    job = job_for(folder, tokenizer_folder, add_bos=bos, append_eos=eos)
    result = prepare(job, workers=2)
    expected = by_hand(texts, tokenizer_folder, bos, eos)
    assert documents_of(result.prefixes[0]) == expected
    sidecar = json.loads(Path(f"{job.output}.json").read_text())
    text_bytes = sum(len(text.encode()) for text in texts if text.strip())
    tokens = sum(map(len, expected))
    assert sidecar["documents"] == 58 and sidecar["empty_documents_skipped"] == 2 and sidecar["tokens"] == tokens
    assert sidecar["text_bytes"] == text_bytes and sidecar["bytes_per_token"] == round(text_bytes / tokens, 4)
    assert sidecar["max_token_id"] == max(map(max, expected)) and sidecar["longest_document"] == max(map(len, expected))
    assert sidecar["eos_token_id"] == (1 if eos else None) and sidecar["bos_token_id"] == (0 if bos else None)
    assert sidecar["tokenizer"]["vocab_size"] == len(AutoTokenizer.from_pretrained(tokenizer_folder))
    assert sorted(path.name for path in Path(job.output).parent.iterdir()) == ["data.bin", "data.idx", "data.json"]


def test_bytes_do_not_depend_on_workers_or_shards(corpus, tokenizer_folder, tmp_path, monkeypatch):
    folder, _ = corpus
    split = Split(seed=1, validation_fraction=0.2)
    found = []
    for number, (workers, shard) in enumerate([(1, 10**6), (1, 3000), (2, 3000), (4, 500)]):
        monkeypatch.setattr(preparation, "SHARD_BYTES", (shard, shard))
        prepare(job_for(folder, tokenizer_folder, output=str(tmp_path / f"out{number}" / "data"), split=split), workers=workers)
        found.append(files_of(tmp_path / f"out{number}"))
    assert len(found[0]) == 6
    assert found[1] == found[2]
    for files in found[1:]:
        assert all(files[name] == found[0][name] for name in files if not name.endswith(".json"))  # it names the shard size


def test_large_vocabularies_take_int32(corpus, tokenizer_folder, monkeypatch):
    folder, texts = corpus
    monkeypatch.setattr(preparation, "dtype_for", lambda vocab_size: dtype_for(vocab_size + 65500))
    job = job_for(folder, tokenizer_folder, split=Split(validation_documents=1))
    prepare(job, workers=1)
    assert open_indexed(f"{job.output}_train").dtype == np.int32
    found = documents_of(f"{job.output}_train") + documents_of(f"{job.output}_validation")
    assert sorted(found) == sorted(by_hand(texts, tokenizer_folder))


def test_separator_and_text_field(tmp_path, tokenizer_folder):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = make_texts(9, longest=20)
    (folder / "a.txt").write_text("\n---\n".join(texts[:5]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts[5:]))
    job = job_for(folder, tokenizer_folder, text=TextOptions(text_field="body", separator="---"))
    prepare(job, workers=1)
    expected = [text + "\n" for text in texts[:4]] + texts[4:]
    assert documents_of(job.output) == by_hand(expected, tokenizer_folder)


def test_fraction_split_is_a_pure_function_of_seed_and_number(corpus, tokenizer_folder, tmp_path, small_shards):
    folder, texts = corpus
    expected = by_hand(texts, tokenizer_folder)
    key = key_of("validation 5")
    chosen = [splitmix64(key ^ number) < 0.3 * 2**64 for number in range(len(expected))]
    assert 5 < sum(chosen) < 30
    job = job_for(folder, tokenizer_folder, split=Split(seed=5, validation_fraction=0.3))
    result = prepare(job, workers=2)
    assert [path.name for path in result.prefixes] == ["data_train", "data_validation"]
    assert documents_of(f"{job.output}_train") == [d for d, out in zip(expected, chosen, strict=True) if not out]
    assert documents_of(f"{job.output}_validation") == [d for d, out in zip(expected, chosen, strict=True) if out]


def test_split_by_count(corpus, tokenizer_folder, small_shards):
    folder, texts = corpus
    expected = by_hand(texts, tokenizer_folder)
    job = job_for(folder, tokenizer_folder, split=Split(validation_documents=7))
    prepare(job, workers=2)
    train, validation = documents_of(f"{job.output}_train"), documents_of(f"{job.output}_validation")
    assert len(validation) == 7 and len(train) == len(expected) - 7
    assert sorted(train + validation) == sorted(expected)


def test_seeds_choose_different_documents():
    masks = [Split(seed=seed, validation_documents=10).validation_mask(1000) for seed in range(3)]
    assert all(mask.sum() == 10 for mask in masks) and not (masks[0] & masks[1] & masks[2]).any()


@pytest.mark.parametrize("workers", [1, 3])
def test_max_documents_are_the_first(corpus, tokenizer_folder, small_shards, workers):
    folder, texts = corpus
    write_jsonl(folder / "3.jsonl", make_texts(300))
    (folder / "4.jsonl").write_text("not json\n")  # never reached
    job = job_for(folder, tokenizer_folder, max_documents=11)
    prepare(job, workers=workers)
    assert documents_of(job.output) == by_hand(texts, tokenizer_folder)[:11]


def test_second_run_does_nothing_and_another_job_is_refused(corpus, tokenizer_folder):
    folder, texts = corpus
    job = job_for(folder, tokenizer_folder)
    assert not prepare(job, workers=1).finished_before
    out = Path(job.output).parent
    before, times = files_of(out), [path.stat().st_mtime_ns for path in sorted(out.iterdir())]
    assert prepare(job, workers=1).finished_before
    with pytest.raises(UserError, match=r"data\.bin: exists already; .* --overwrite"):
        prepare(job_for(folder, tokenizer_folder, append_eos=False), workers=1)
    assert times == [path.stat().st_mtime_ns for path in sorted(out.iterdir())] and files_of(out) == before
    prepare(job_for(folder, tokenizer_folder, append_eos=False), workers=1, overwrite=True)
    assert documents_of(job.output) == by_hand(texts, tokenizer_folder, eos=False)


def test_a_damaged_output_is_not_taken_for_finished(corpus, tokenizer_folder):
    folder, _ = corpus
    job = job_for(folder, tokenizer_folder)
    prepare(job, workers=1)
    good = files_of(Path(job.output).parent)
    Path(f"{job.output}.bin").write_bytes(good["data.bin"][:-2])
    with pytest.raises(UserError, match="exists already"):
        prepare(job, workers=1)
    prepare(job, workers=1, overwrite=True)
    assert files_of(Path(job.output).parent) == good


def mend_unseen(bad):
    """Blank a file, leaving its size and time of change, so that the job counts as the same."""
    stat = bad.stat()
    bad.write_text(" " * stat.st_size)
    os.utime(bad, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_finished_parts_are_kept_and_those_of_another_job_refused(corpus, tokenizer_folder, small_shards):
    folder, texts = corpus
    bad = folder / "9.jsonl"
    bad.write_text("not json\n")
    job = job_for(folder, tokenizer_folder)
    with pytest.raises(UserError, match="9.jsonl: line 1"):
        prepare(job, workers=1)
    parts = Path(f"{job.output}.parts")
    assert len(list(parts.glob("part-*.json"))) >= 5  # all but the bad one, the last of the shards by size
    with pytest.raises(UserError, match=r"data\.parts: holds parts of another job \(differs in add_bos\); remove it or give --overwrite"):
        prepare(job_for(folder, tokenizer_folder, add_bos=True), workers=1)
    # The same job keeps them: a part that we change by hand shows in the result. The second part, a whole shard, came before the
    # bad file; the first, of two small files, comes after it.
    marker = json.loads((parts / "part-000001.json").read_text())
    part = parts / "part-000001.bin"
    part.write_bytes(np.full(marker["tokens"], 3, np.uint16).tobytes() + part.read_bytes()[2 * marker["tokens"] :])
    mend_unseen(bad)
    prepare(job, workers=1)
    found = documents_of(job.output)
    assert set(found[2]) == {3} and [found[0], found[1], found[-1]] == [by_hand(texts, tokenizer_folder)[i] for i in (0, 1, -1)]


def test_overwrite_discards_parts_of_another_job(corpus, tokenizer_folder, small_shards):
    folder, texts = corpus
    bad = folder / "9.jsonl"
    bad.write_text("not json\n")
    job = job_for(folder, tokenizer_folder)
    with pytest.raises(UserError):
        prepare(job, workers=1)
    bad.unlink()
    with pytest.raises(UserError, match="differs in sources"):
        prepare(job, workers=1)
    prepare(job, workers=1, overwrite=True)
    assert documents_of(job.output) == by_hand(texts, tokenizer_folder)


def test_a_folder_that_is_not_ours_is_never_removed(corpus, tokenizer_folder):
    folder, _ = corpus
    job = job_for(folder, tokenizer_folder)
    mine = Path(f"{job.output}.parts")
    mine.mkdir(parents=True)
    (mine / "thesis.tex").write_text("ten years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds no job.json, so it is not ours"):
            prepare(job, workers=1, overwrite=overwrite)
    assert (mine / "thesis.tex").read_text() == "ten years of work"


def test_bad_input_leaves_earlier_output_untouched(corpus, tokenizer_folder):
    folder, _ = corpus
    job = job_for(folder, tokenizer_folder)
    prepare(job, workers=1)
    before = files_of(Path(job.output).parent)
    (folder / "9.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match="9.jsonl: line 1"):
        prepare(job, workers=2, overwrite=True)
    assert files_of(Path(job.output).parent) == before


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(validation_documents=58), "58 of 58 documents leaves none for training"),
        (Split(validation_fraction=1e-9), "1e-09 of 58 documents leaves none for validation"),
        (Split(validation_fraction=1 - 1e-9), "leaves none for training"),
    ],
)
def test_a_split_with_an_empty_side(corpus, tokenizer_folder, split, message):
    folder, texts = corpus
    job = job_for(folder, tokenizer_folder, split=split)
    with pytest.raises(UserError, match=message):
        prepare(job, workers=1)
    prepare(job_for(folder, tokenizer_folder, split=Split(validation_documents=1)), workers=1)  # the parts are used again
    assert len(documents_of(f"{job.output}_train")) == 57


def test_no_documents(tmp_path, tokenizer_folder):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text(" \n ")
    (folder / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match=r"--input: holds no documents \(2 empty ones skipped\)"):
        prepare(job_for(folder, tokenizer_folder), workers=1)
