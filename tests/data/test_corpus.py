"""Documents from files: segments partition them whatever the cut, and bad input is named by file and line."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from endprompt.data import corpus as corpus_module
from endprompt.data.corpus import TextOptions, find_files, plan_segments
from endprompt.data.readers import read_segment
from endprompt.errors import UserError
from tests.support.corpora import make_texts, write_jsonl


def read(path, options=None, segment_bytes=2**20):
    options = options or TextOptions()
    segments = plan_segments([Path(path)], options, segment_bytes)
    return [document.text for segment in segments for document in read_segment(segment, options)]


@pytest.mark.parametrize("segment_bytes", [1, 2, 7, 64, 1000, 10**6])
def test_segments_partition_json_lines(tmp_path, segment_bytes):
    texts = make_texts(12, longest=12)
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    assert read(path, segment_bytes=segment_bytes) == texts
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # a last line without its end
    assert read(path, segment_bytes=segment_bytes) == texts


@pytest.mark.parametrize("segment_bytes", [1, 2, 3, 7, 20, 64, 10**6])
def test_segments_partition_separated_text(tmp_path, segment_bytes):
    path, options = tmp_path / "a.txt", TextOptions(separator="<end>")
    path.write_bytes(b"first\nline two\n<end>\n<end>\r\nthird <end> stays\n <end>\n<end>\nlast, no newline")
    expected = ["first\nline two\n", "", "third <end> stays\n <end>\n", "last, no newline"]
    assert read(path, options, segment_bytes) == expected
    path.write_bytes(path.read_bytes() + b"\n<end>\n")  # a separator at the end opens no document
    assert read(path, options, segment_bytes) == [*expected[:-1], "last, no newline\n"]


def test_a_text_file_is_one_document_byte_for_byte(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffBOM is dropped,\r\n line ends stay \n".encode())
    assert read(path, segment_bytes=1) == ["BOM is dropped,\r\n line ends stay \n"]


def test_byte_order_mark_and_blank_lines_in_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\n\n  \n{"text": "two"}\n')
    assert read(path) == ["one", "two"]
    path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(path.with_suffix(".jsonl.gz")) == ["one", "two"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz"])
def test_gzip(tmp_path, suffix):
    texts = make_texts(30)
    plain = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(plain.read_bytes()))
    assert read(tmp_path / f"a{suffix}") == texts


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_row_groups(tmp_path, kind):
    texts = make_texts(700, longest=5)
    table = pa.table({"id": range(700), "body": pa.array(texts).cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    options = TextOptions(text_field="body")
    assert len(plan_segments([tmp_path / "a.parquet"], options, 1)) == 3
    assert read(tmp_path / "a.parquet", options) == texts


def test_used_bytes_add_up_to_the_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    segments = plan_segments([path], TextOptions(), 500)
    assert sum(segment.size for segment in segments) == path.stat().st_size
    assert sum(document.used for segment in segments for document in read_segment(segment, TextOptions())) == path.stat().st_size


def test_find_files(tmp_path):
    for name in ("b/2.txt", "b/10.jsonl", "b/.hidden/x.txt", "b/.x.txt", "b/readme.md", "a.parquet", "c/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * len(name))
    files, sources, ignored = find_files([str(tmp_path / "b"), str(tmp_path / "a.parquet"), str(tmp_path / "c" / "*.txt")])
    assert [str(path.relative_to(tmp_path)) for path in files] == ["b/10.jsonl", "b/2.txt", "a.parquet", "c/1.txt"]
    assert ignored == 1
    assert [(source["files"], source["bytes"]) for source in sources] == [(2, 10 + 7), (1, 9), (1, 7)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["gone"], "--input {}/gone: no such file"),
        (["*.zst"], "no such file, folder or match"),
        (["empty"], "--input {}/empty: holds no text files"),
        (["notes.md"], "{}/notes.md: is not of a known type"),
        (["a.txt", "*.txt"], "{}/a.txt: is given twice"),
    ],
)
def test_inputs_that_are_not_there(tmp_path, given, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError) as caught:
        find_files([str(tmp_path / name) for name in given])
    assert message.format(tmp_path) in str(caught.value)


GOOD = json.dumps({"text": "fine"}).encode()
BAD_LINES = {
    "is not valid JSON (Expecting value at column 10)": b'{"text": }',
    "is not valid JSON (Unterminated string": b'{"text": "cut off',
    "is not valid JSON (Exceeds the limit": b'{"n": ' + b"9" * 5000 + b"}",
    "is not valid JSON (maximum recursion": b"[" * 100_000,
    "has no field 'text'; choose --text-field from 'id', 'body'": b'{"id": 1, "body": "x"}',
    "has no field 'text'": b"{}",
    "is a JSON list, not an object": b'["text"]',
    "field 'text' is null, not a string": b'{"text": null}',
    "field 'text' is 12, not a string": b'{"text": 12}',
    "is not UTF-8 (byte 0xe9)": '{"text": "café"}'.encode("latin-1"),
    "holds a lone surrogate '\\ud83d'": b'{"text": "half \\ud83d"}',
}


@pytest.mark.parametrize("message", BAD_LINES)
@pytest.mark.parametrize("packed", [False, True], ids=["jsonl", "gzip"])
def test_bad_json_lines_name_file_and_line(tmp_path, message, packed):
    data = b"\n".join([GOOD, b"", GOOD, BAD_LINES[message], GOOD]) + b"\n"
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    with pytest.raises(UserError) as caught:
        read(path, segment_bytes=5)  # most segments begin in mid-file, where line numbers are not known
    assert f"{path}: line 4: {message}" in str(caught.value) and "\n" not in str(caught.value)


def test_undecodable_text_names_the_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n--\ntwo\nthree \xff\n--\nfour\n")
    for options in (TextOptions(), TextOptions(separator="--")):
        with pytest.raises(UserError, match=r"a\.txt: line 4: is not UTF-8 \(byte 0xff\)"):
            read(path, options, 3)


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(b"".join(GOOD + b"\n" for _ in range(50_000)), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for data in (whole[:-50], b"not gzip", whole[:50] + b"\0" * 50):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz: damaged gzip data after line"):
            read(path)


def test_bad_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="a.parquet: is not a readable parquet file"):
        read(path)
    pq.write_table(pa.table({"n": [1, 2], "body": ["x", None]}), path)
    with pytest.raises(UserError, match="has no column 'text'; choose --text-field from 'n', 'body'"):
        read(path)
    with pytest.raises(UserError, match="column 'n' holds int64, not strings"):
        read(path, TextOptions(text_field="n"))
    with pytest.raises(UserError, match="row 2: column 'body' is null"):
        read(path, TextOptions(text_field="body"))


def test_damaged_parquet_pages(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": make_texts(400)}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[100:2000] = bytes(1900)
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.parquet: damaged parquet data near row 1"):
        read(path)


def test_parquet_with_bytes_that_are_not_text(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9"], pa.binary())
    forged = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": forged}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"row 2: is not UTF-8 \(byte 0xe9\)"):
        read(tmp_path / "a.parquet")


def test_too_long_documents_are_refused_before_they_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("endprompt.data.corpus.MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr("endprompt.data.readers.MAX_DOCUMENT_BYTES", 1000)
    (tmp_path / "a.txt").write_text("x" * 1001)
    write_jsonl(tmp_path / "b.jsonl", ["fine", "x" * 1001])
    with pytest.raises(UserError, match=r"a\.txt: one document of .* --separator"):
        read(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"b\.jsonl: line 2: one document of"):
        read(tmp_path / "b.jsonl")
    assert corpus_module.MAX_DOCUMENT_BYTES == 1000
