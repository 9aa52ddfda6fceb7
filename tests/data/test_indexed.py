"""The reader and writer of .bin/.idx against megatron.core's, and every damage that a file can have."""

import pickle
import struct

import numpy as np
import pytest
import torch

from endprompt.data.indexed import DTYPES, HEADER, dtype_for, open_indexed, write_indexed
from endprompt.errors import UserError

DOCUMENTS = [np.array([5, 6, 7]), np.array([8]), np.array([], dtype=np.int64), np.arange(100, 400)]


@pytest.fixture(scope="module")
def megatron():
    return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_files_equal_megatrons_builder(tmp_path, megatron, dtype):
    documents = [document % 120 for document in DOCUMENTS]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_indexed(tmp_path / "ours", documents, dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_ours(tmp_path, megatron):
    write_indexed(tmp_path / "ours", DOCUMENTS, np.uint16)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == len(DOCUMENTS)
    for i, document in enumerate(DOCUMENTS):
        assert np.array_equal(theirs[i], document)


def test_reads_megatrons_with_several_sequences_a_document(tmp_path, megatron):
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for document in DOCUMENTS:  # as preprocess_data.py --split-sentences does
        for sentence in np.array_split(document, 3):
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    text = open_indexed(tmp_path / "theirs")
    assert text.num_tokens == 304 and text.dtype == np.int32 and len(text) == 4
    assert text.document_lengths.tolist() == [3, 1, 0, 300]
    for i, document in enumerate(DOCUMENTS):
        assert np.array_equal(text.document(i), document)


def test_dtype_is_megatrons_choice(megatron):
    for size in (1, 49152, 65499, 65500, 128256):
        assert dtype_for(size) == megatron.DType.optimal_dtype(size)
    assert {code: np.dtype(dtype).name for code, dtype in DTYPES.items()} == {
        kind.value: kind.name for kind in megatron.DType if not kind.name.startswith("float")
    }


def test_read_is_a_window_of_the_stream(tmp_path):
    write_indexed(tmp_path / "d", DOCUMENTS, np.uint16)
    text, stream = open_indexed(tmp_path / "d"), np.concatenate(DOCUMENTS)
    assert text.read(2, 5).dtype == np.int64
    for start, length in ((0, 304), (2, 5), (303, 1), (304, 0)):
        assert np.array_equal(text.read(start, length), stream[start : start + length])
    for start, length in ((-1, 2), (303, 2), (0, 305), (5, -1)):
        with pytest.raises(ValueError, match="outside"):
            text.read(start, length)
    with pytest.raises(IndexError):
        text.document(4)


def test_pickle_carries_the_path_not_the_tokens(tmp_path):
    write_indexed(tmp_path / "d", [np.arange(50_000)], np.uint16)
    pickled = pickle.dumps(open_indexed(tmp_path / "d"))
    assert len(pickled) < 1000
    assert np.array_equal(pickle.loads(pickled).read(0, 50_000), np.arange(50_000))


def test_writer_refuses_ids_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="do not fit uint16"):
        write_indexed(tmp_path / "d", [np.array([1]), np.array([65536])], np.uint16)
    assert list(tmp_path.iterdir()) == []


def _header(**changes):
    fields = {"magic": b"MMIDIDX\x00\x00", "version": 1, "code": 8, "sequences": 4, "marks": 5, **changes}
    return HEADER.pack(*fields.values())


DAMAGE = {
    "no such file": lambda data, index: index.unlink(),
    "d.bin: no such file": lambda data, index: data.unlink(),
    "wrong magic": lambda data, index: index.write_bytes(b"PK" + index.read_bytes()[2:]),
    "wrong magic)": lambda data, index: index.write_bytes(b""),
    "is truncated: 20 bytes, the header alone has 34": lambda data, index: index.write_bytes(index.read_bytes()[:20]),
    "version 2": lambda data, index: index.write_bytes(_header(version=2) + index.read_bytes()[34:]),
    "dtype code 7": lambda data, index: index.write_bytes(_header(code=7) + index.read_bytes()[34:]),
    "is truncated: 121 bytes, its header says 122": lambda data, index: index.write_bytes(index.read_bytes()[:-1]),
    "its header says": lambda data, index: index.write_bytes(_header(sequences=2**60) + index.read_bytes()[34:]),
    "4 bytes more than a text index": lambda data, index: index.write_bytes(index.read_bytes() + b"\0" * 4),
    "not lie back to back": lambda data, index: index.write_bytes(index.read_bytes()[:34] + struct.pack("<i", 2) + index.read_bytes()[38:]),
    "back to back": lambda data, index: index.write_bytes(index.read_bytes()[:34] + struct.pack("<i", -3) + index.read_bytes()[38:]),
    "document boundaries": lambda data, index: index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 3)),
    "has 606 bytes, its index says 608": lambda data, index: data.write_bytes(data.read_bytes()[:-2]),
    "has 610 bytes": lambda data, index: data.write_bytes(data.read_bytes() + b"\0\0"),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_damage_is_one_line_that_names_the_file(tmp_path, message):
    write_indexed(tmp_path / "d", DOCUMENTS, np.uint16)
    DAMAGE[message](tmp_path / "d.bin", tmp_path / "d.idx")
    with pytest.raises(UserError) as caught:
        open_indexed(tmp_path / "d")
    assert message in str(caught.value) and str(tmp_path / "d.") in str(caught.value) and "\n" not in str(caught.value)


def test_empty_datasets_are_refused(tmp_path):
    for documents in ([], [np.array([], dtype=np.int64)]):
        write_indexed(tmp_path / "d", documents, np.uint16)
        with pytest.raises(UserError, match="holds no tokens"):
            open_indexed(tmp_path / "d")


def test_a_path_with_its_suffix_gets_a_hint(tmp_path):
    write_indexed(tmp_path / "d", DOCUMENTS, np.uint16)
    with pytest.raises(UserError, match="prefix without .bin"):
        open_indexed(tmp_path / "d.bin")
