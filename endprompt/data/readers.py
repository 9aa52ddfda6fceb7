"""Reading one segment of a corpus: every document in order, or a UserError that names file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from endprompt.data.corpus import MAX_DOCUMENT_BYTES, Segment, TextOptions, too_long
from endprompt.errors import UserError

BOM = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 256


class Document(NamedTuple):
    """text_bytes: of its UTF-8 form. used: bytes of the segment used up since the document before, for progress."""

    text: str
    text_bytes: int
    used: int


def read_segment(segment: Segment, options: TextOptions) -> Iterator[Document]:
    """Documents whose beginning lies in the segment, empty ones included.

    Raises UserError for undecodable UTF-8, bad JSON, a missing or wrong field, and damaged files.
    """
    if segment.kind == "parquet":
        documents = _parquet_documents(segment, options.text_field)
    elif segment.kind == "gzip":
        documents = _gzip_documents(segment, options.text_field)
    elif segment.kind == "jsonl":
        documents = _jsonl_documents(segment, options.text_field)
    elif options.separator is not None:
        documents = _separated_documents(segment, options.separator)
    else:
        documents = _whole_file(segment)
    for text, used, offset in documents:
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:  # JSON may spell half of a surrogate pair as an escape, which is no text
            where = _where(segment, offset)
            raise UserError(where, f"holds a lone surrogate {text[error.start]!a}", "repair or remove the document") from None
        if size > MAX_DOCUMENT_BYTES:
            raise too_long(_where(segment, offset), size)
        yield Document(text, size, used)


def _whole_file(segment: Segment) -> Iterator[tuple[str, int, int]]:
    data = Path(segment.path).read_bytes()
    content = data.removeprefix(BOM)
    yield _decode(content, segment.path, len(data) - len(content)), len(data), 0


def _where(segment: Segment, offset: int) -> str:
    """`file: line N`. offset: of the document's first byte for files of bytes, its line or row number - 1 otherwise."""
    if segment.kind in ("gzip", "parquet"):
        return f"{segment.path}: {'row' if segment.kind == 'parquet' else 'line'} {offset + 1}"
    return f"{segment.path}: line {_newlines_before(segment.path, offset) + 1}"


def _newlines_before(path: str, offset: int) -> int:
    """Counted only when an error is reported: a worker that starts in mid-file does not know its line numbers."""
    count = 0
    with open(path, "rb") as file:
        while offset > 0 and (block := file.read(min(offset, 2**20))):
            count += block.count(b"\n")
            offset -= len(block)
    return count


def _decode(data: bytes, path: str, offset: int) -> str:
    """data begins at byte `offset` of the file."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{path}: line {_newlines_before(path, offset + error.start) + 1}"
        raise _not_utf8(where, error) from None


def _not_utf8(where: str, error: UnicodeDecodeError) -> UserError:
    return UserError(where, f"is not UTF-8 (byte 0x{error.object[error.start]:02x})", "convert it, for instance with iconv -t UTF-8")


def _lines(segment: Segment) -> Iterator[tuple[int, bytes]]:
    """(offset, line) for lines from the first that begins at or after segment.start, to the end of the file."""
    with open(segment.path, "rb") as file:
        if segment.start:
            file.seek(segment.start - 1)
            file.readline()
        offset = file.tell()
        for line in file:
            yield offset, line
            offset += len(line)


def _jsonl_documents(segment: Segment, field: str) -> Iterator[tuple[str, int, int]]:
    for offset, line in _lines(segment):
        if offset >= segment.stop:
            return
        content = line.removeprefix(BOM) if offset == 0 else line
        if content.strip():
            yield _text_of(content, field, segment, offset), len(line), offset


def _gzip_documents(segment: Segment, field: str) -> Iterator[tuple[str, int, int]]:
    number = before = 0
    with open(segment.path, "rb") as raw, gzip.GzipFile(fileobj=raw) as file:
        try:
            for number, line in enumerate(file):
                content = line.removeprefix(BOM) if number == 0 else line
                if content.strip():
                    now = raw.tell()
                    yield _text_of(content, field, segment, number), now - before, number
                    before = now
        except (EOFError, zlib.error, gzip.BadGzipFile):
            raise UserError(segment.path, f"damaged gzip data after line {number + 1}", "fetch the file again") from None


def _text_of(line: bytes, field: str, segment: Segment, offset: int) -> str:
    """The text field of one JSON line. segment, offset: where the line is, for the error."""
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(_where(segment, offset), error) from None
    except (ValueError, RecursionError) as error:
        precise = isinstance(error, json.JSONDecodeError)
        detail = f"{error.msg.removesuffix(' at')} at column {error.colno}" if precise else _first_line(error)
        raise UserError(_where(segment, offset), f"is not valid JSON ({detail})", "write one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(_where(segment, offset), f"is a JSON {type(record).__name__}, not an object", "write one JSON object a line")
    if field not in record:
        known = ", ".join(map(repr, record)) or "other files, this line is empty"
        raise UserError(_where(segment, offset), f"has no field {field!r}", f"choose --text-field from {known}")
    if not isinstance(record[field], str):
        problem = f"field {field!r} is {json.dumps(record[field])[:40]}, not a string"
        raise UserError(_where(segment, offset), problem, "repair the line or choose another --text-field")
    return record[field]


def _separated_documents(segment: Segment, separator: str) -> Iterator[tuple[str, int, int]]:
    """Every separator line that begins inside the segment opens a document; the file's first needs none."""
    mark = separator.encode("utf-8")
    opened, document, begin = segment.start == 0, [], 0
    for offset, line in _lines(segment):
        content = line.removeprefix(BOM) if offset == 0 else line
        if content.rstrip(b"\r\n") == mark:
            if opened:
                yield _decode(b"".join(document), segment.path, begin), offset - begin, begin
            if offset >= segment.stop:
                return
            opened, document, begin = True, [], offset + len(line)
        elif opened:
            document.append(content)
            begin += len(line) - len(content)
        elif offset >= segment.stop:
            return
    if opened and document:
        text = b"".join(document)
        yield _decode(text, segment.path, begin), len(text), begin


def _open_parquet(path: str | Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(path, "reading parquet needs pyarrow", "pip install pyarrow") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(path, f"is not a readable parquet file ({_first_line(error)})", "fetch the file again") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def parquet_row_groups(path: Path, field: str) -> list[int]:
    """Compressed bytes of the text column, per row group. Raises UserError if there is no such column of strings."""
    import pyarrow

    with _open_parquet(path) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if field not in schema.names:
            raise UserError(path, f"has no column {field!r}", f"choose --text-field from {', '.join(map(repr, schema.names))}")
        kind = schema.field(field).type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UserError(path, f"column {field!r} holds {kind}, not strings", "choose another --text-field")
        column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == field)
        return [metadata.row_group(g).column(column).total_compressed_size for g in range(metadata.num_row_groups)]


def _parquet_documents(segment: Segment, field: str) -> Iterator[tuple[str, int, int]]:
    import pyarrow

    with _open_parquet(segment.path) as file:
        row = sum(file.metadata.row_group(g).num_rows for g in range(segment.start))
        share = segment.size // max(1, file.metadata.row_group(segment.start).num_rows)
        try:
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[segment.start], columns=[field]):
                for value in batch.column(0):
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise _not_utf8(_where(segment, row), error) from None
                    if text is None:
                        raise UserError(_where(segment, row), f"column {field!r} is null", "repair the row or choose another --text-field")
                    yield text, share, row
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(segment.path, f"damaged parquet data near row {row + 1} ({_first_line(error)})", "fetch it again") from None
