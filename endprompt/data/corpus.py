"""Documents from files: .txt, JSON lines (plain or gzip) and parquet, cut into segments that any process can read alone.

A corpus is planned without being read: files of bytes are cut at nominal offsets and a document belongs to the segment
in which its line (or the separator before it) begins, so segments partition the documents whatever the cut.
"""

from __future__ import annotations

import glob
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from endprompt.errors import UserError

SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".jsonl.gz": "gzip", ".json.gz": "gzip", ".parquet": "parquet"}

MAX_DOCUMENT_BYTES = 64 * 2**20
"""A tokenizer takes a document as a whole and needs about 120 bytes per byte of it: 8 GB at this size."""


@dataclass(frozen=True)
class TextOptions:
    """How documents are found in files.

    text_field: field of a JSON line or column of a parquet file. separator: the line that stands between documents of
    a .txt file; None makes every .txt file one document.
    """

    text_field: str = "text"
    separator: str | None = None


@dataclass(frozen=True)
class Segment:
    """A part of a file: bytes start..stop (text, jsonl), the whole file (gzip), or row group `start` (parquet).

    size: bytes on disk, for progress.
    """

    path: str
    kind: str
    start: int
    stop: int
    size: int


def find_files(inputs: list[str]) -> tuple[list[Path], list[dict], int]:
    """Files of the inputs: files, folders (searched recursively, names with a leading dot left out) and glob patterns.

    Returns the files in order (inputs as given, sorted by path within each), one {"path", "files", "bytes"} per input,
    and how many files of other types were left out. Raises UserError where an input gives nothing or a file comes twice.
    """
    found: list[Path] = []
    sources, ignored = [], 0
    for given in inputs:
        path = Path(given)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
            files = [p for p in inside if _kind(p)]
            ignored += len(inside) - len(files)
        elif path.is_file():
            files = [path]
        else:
            files = sorted(Path(p) for p in glob.glob(given, recursive=True) if Path(p).is_file())
            if not files:
                raise UserError(f"--input {given}", "no such file, folder or match", "check the path")
        unknown = [p for p in files if not _kind(p)]
        if unknown:
            raise UserError(unknown[0], "is not of a known type", f"convert it to one of {', '.join(SUFFIXES)}")
        if not files:
            raise UserError(f"--input {given}", "holds no text files", f"put files of type {', '.join(SUFFIXES)} there")
        found += files
        sources.append({"path": given, "files": len(files), "bytes": sum(p.stat().st_size for p in files)})
    twice = [path for path, count in Counter(p.resolve() for p in found).items() if count > 1]
    if twice:
        raise UserError(twice[0], "is given twice by --input", "name it once")
    return found, sources, ignored


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    return next((kind for suffix, kind in SUFFIXES.items() if name.endswith(suffix)), None)


def plan_segments(files: list[Path], options: TextOptions, segment_bytes: int) -> list[Segment]:
    """Cut files into segments of about `segment_bytes`, in the order of the documents. Reads parquet footers only."""
    segments = []
    for path in files:
        kind, size = _kind(path), path.stat().st_size
        if kind == "parquet":
            from endprompt.data.readers import parquet_row_groups

            groups = parquet_row_groups(path, options.text_field)
            segments += [Segment(str(path), kind, group, group + 1, bytes_) for group, bytes_ in enumerate(groups)]
        elif kind == "jsonl" or (kind == "text" and options.separator is not None):
            cuts = [*range(0, size, segment_bytes), size]
            segments += [Segment(str(path), kind, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
        else:
            if kind == "text" and size > MAX_DOCUMENT_BYTES:
                raise too_long(path, size)
            segments.append(Segment(str(path), kind, 0, size, size))
    return segments


def too_long(where: object, size: int) -> UserError:
    return UserError(
        where,
        f"one document of {size / 2**20:.0f} MiB, the limit is {MAX_DOCUMENT_BYTES // 2**20}",
        "split it: --separator LINE for .txt files, one document a line or row otherwise",
    )
