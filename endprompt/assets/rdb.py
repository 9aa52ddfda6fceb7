"""Read character vectors from an R lazy-load database (`Rdata.rdb` with its index `Rdata.rdx`), without R.

Formats: R Internals, section "Serialization Formats"; R sources `src/main/serialize.c` and `src/main/lazyload.c`. The
index is a gzipped R list whose `variables` give (offset, length) of each object in the .rdb; an object there is a 4-byte
big-endian length followed by a zlib stream of its XDR serialization.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from typing import Any

_SYMBOL, _PAIRLIST, _STRING, _LOGICAL, _INTEGER, _DOUBLE, _CHARACTER, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_NULL, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400
_IS_LATIN1 = 1 << (12 + 2)  # CHARSXP keeps its encoding in the "general purpose" bits, which start at bit 12


def read_rdb(index: bytes, database: bytes) -> dict[str, Any]:
    """Every object of the database by name: lists of str (None for NA), int or float; lists of such as Python lists.

    Raises ValueError for bytes that are not such a database, or that use a part of the format not read here.
    """
    try:
        table = _named(_Reader(gzip.decompress(index)).document())
        variables = _named(table["variables"])
        if table["compressed"][0] != [1]:
            raise ValueError(f"compression {table['compressed'][0]} instead of zlib")
        return {name: _object(database, *place[0]) for name, place in variables.items()}
    except (struct.error, zlib.error, gzip.BadGzipFile, EOFError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not an R lazy-load database ({error})") from error


def _object(database: bytes, offset: int, length: int) -> Any:
    (size,) = struct.unpack_from(">I", database, offset)
    data = zlib.decompress(database[offset + 4 : offset + length])
    if len(data) != size:
        raise ValueError(f"object of {len(data)} bytes where {size} are announced")
    return _Reader(data).document()[0]


def _named(value: tuple[Any, dict]) -> dict[str, Any]:
    items, attributes = value
    return dict(zip(attributes["names"][0], items, strict=True))


class _Reader:
    """A serialized R object. `item` gives (value, attributes) for vectors and lists, the name itself for symbols."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0
        self.references: list[str] = []

    def _take(self, layout: str) -> tuple:
        values = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return values

    def _integer(self) -> int:
        return self._take(">i")[0]

    def document(self) -> Any:
        if self._take("2s")[0] != b"X\n":
            raise ValueError("not R's XDR serialization")
        version, _, _ = self._take(">3i")
        if version == 3:  # version 3 names the native encoding; strings carry their own as well
            self._take(f"{self._integer()}s")
        return self.item()

    def item(self) -> Any:
        flags = self._integer()
        kind = flags & 0xFF
        if kind == _NULL:
            return None
        if kind == _SYMBOL:
            self.references.append(self.item())
            return self.references[-1]
        if kind == _REFERENCE:
            return self.references[(flags >> 8 or self._integer()) - 1]
        if kind == _STRING:
            length = self._integer()
            if length == -1:
                return None
            return self._take(f"{length}s")[0].decode("latin-1" if flags & _IS_LATIN1 else "utf-8")
        if kind == _PAIRLIST:
            return self._pairlist(flags)
        length = self._integer()
        if kind in (_LIST, _CHARACTER):
            value = [self.item() for _ in range(length)]
        elif kind in (_INTEGER, _LOGICAL):
            value = list(self._take(f">{length}i"))
        elif kind == _DOUBLE:
            value = list(self._take(f">{length}d"))
        else:
            raise ValueError(f"R type {kind} at byte {self.at}")
        attributes = dict(self.item() or ()) if flags & _HAS_ATTRIBUTES else {}
        return value, attributes

    def _pairlist(self, flags: int) -> list[tuple[str | None, Any]]:
        pairs = []
        while flags & 0xFF == _PAIRLIST:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else None
            pairs.append((tag, self.item()))
            flags = self._integer()
        if flags & 0xFF != _NULL:
            raise ValueError(f"pair list ends in R type {flags & 0xFF}")
        return pairs
