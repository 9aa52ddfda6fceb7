"""The R reader against serialized bytes written here from the description of the format."""

from __future__ import annotations

import gzip
import struct
import zlib

import pytest

from endprompt.assets.rdb import read_rdb

NULL = struct.pack(">i", 254)


def integers(*values: int) -> bytes:
    return struct.pack(f">{len(values) + 2}i", 13, len(values), *values)


def string(text: str | None, encoding: str = "utf-8") -> bytes:
    if text is None:
        return struct.pack(">2i", 9, -1)
    data = text.encode(encoding)
    return struct.pack(">2i", 9 | (1 << 14 if encoding == "latin-1" else 1 << 15), len(data)) + data


def strings(*texts: str | None, encoding: str = "utf-8") -> bytes:
    return struct.pack(">2i", 16, len(texts)) + b"".join(string(text, encoding) for text in texts)


def named_list(items: dict[str, bytes], names_symbol: bytes) -> bytes:
    """A list with the attribute `names`: a pair list of one tagged element."""
    attributes = struct.pack(">i", 2 | 0x400) + names_symbol + strings(*items) + NULL
    return struct.pack(">2i", 19 | 0x200, len(items)) + b"".join(items.values()) + attributes


SYMBOL = struct.pack(">i", 1) + string("names")
REFERENCE = struct.pack(">i", 255 | 1 << 8)


def document(item: bytes, version: int = 3) -> bytes:
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">3i", version, 0x040201, 0x030500) + encoding + item


def database(objects: dict[str, bytes], compression: int = 1, version: int = 3) -> tuple[bytes, bytes]:
    stored, places = b"", {}
    for name, item in objects.items():
        data = document(item, version)
        entry = struct.pack(">I", len(data)) + zlib.compress(data)
        places[name] = integers(len(stored), len(entry))
        stored += entry
    index = named_list({"variables": named_list(places, SYMBOL), "references": NULL, "compressed": integers(compression)}, REFERENCE)
    return gzip.compress(document(index, version)), stored


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_object_by_name(version):
    lines = ["EMMA", "", "By Jane Austen—“quoted”", None]
    index, stored = database({"emma": strings(*lines), "numbers": integers(3, -4)}, version=version)
    assert read_rdb(index, stored) == {"emma": lines, "numbers": [3, -4]}


def test_latin1_strings_are_decoded_as_such():
    index, stored = database({"text": strings("naïve", encoding="latin-1")})
    assert read_rdb(index, stored) == {"text": ["naïve"]}


def test_attributes_of_an_object_are_skipped_over():
    index, stored = database({"table": named_list({"a": integers(1), "b": strings("x")}, SYMBOL), "after": integers(7)})
    values = read_rdb(index, stored)
    assert [value for value, _ in values["table"]] == [[1], ["x"]] and values["after"] == [7]


@pytest.mark.parametrize(
    ("index", "stored"),
    [
        (b"not gzip", b""),
        (gzip.compress(b"A\n1 2 3"), b""),
        (database({"a": integers(1)})[0], b""),
        (database({"a": integers(1)})[0], database({"a": integers(1)})[1][:-3]),
        database({"a": integers(1)}, compression=3),
        database({"a": struct.pack(">2i", 4, 0)}),
        (gzip.compress(document(integers(1))), b""),
    ],
    ids=["no index", "text serialization", "empty", "truncated", "other compression", "environment", "index is no list"],
)
def test_anything_else_is_refused(index, stored):
    with pytest.raises(ValueError):
        read_rdb(index, stored)
