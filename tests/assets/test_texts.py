from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from endprompt.assets import texts
from endprompt.assets.sources import BIBLE, MOBY_DICK, STATE_OF_THE_UNION, TEXTS
from endprompt.assets.texts import fetch_texts, strip_licence
from endprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def put(cache: Path, source, content: bytes):
    """Place `content` in the cache as the source's archive, and return the source with its checksum."""
    folder = cache / "downloads" / f"{source.package.replace('/', '-').lstrip('@')}-{source.version}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / source.archive).write_bytes(content)
    return replace(source, sha256=hashlib.sha256(content).hexdigest())


def npm_archive() -> bytes:
    files = {
        "package/moby-dick/data/data.txt": "CHAPTER 1. Loomings.\r\n\r\nCall me Ishmael.\r\n\r\n",
        "package/moby-dick/LICENSE": "no text",
        "package/sotu/data/1790_george_washington_n.txt": "Fellow-Citizens — of the Senate",
        "package/sotu/data/1790_george_washington_n.json": "{}",
        "package/sotu/data/1791_george_washington_n.txt": "Fellow-Citizens again",
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, text in files.items():
            data = text.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def bible_archive(tmp_path: Path) -> bytes:
    connection = sqlite3.connect(tmp_path / "Bible.db")
    connection.execute("CREATE TABLE Books (TestamentID INT, BookID INT, ShortName TEXT, LongName TEXT)")
    connection.execute("CREATE TABLE Bible (TestamentID INT, BookID INT, ChapterID INT, VerseID INT, Passage1 TEXT, Passage2 TEXT)")
    connection.executemany("INSERT INTO Books VALUES (?, ?, '', ?)", [(1, 2, "Exodus"), (1, 1, "Genesis"), (2, 1, "Matthew")])
    rows = [
        (1, 2, 1, 1, "1:1 Now these are the names", ""),
        (1, 1, 1, 2, "1:2 And the earth was without form. 1:3 And God said, Let there be light", "and there was light"),
        (1, 1, 1, 1, "1:1 In the beginning", None),
        (2, 1, 1, 1, "1:1 The book of the generation", ""),
    ]
    connection.executemany("INSERT INTO Bible VALUES (?, ?, ?, ?, ?, ?)", rows)
    connection.commit()
    connection.close()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        wheel.write(tmp_path / "Bible.db", BIBLE.members[0])
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache that holds small archives for three sources, and no client that could fetch the fourth."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PATH", str(tmp_path / "no-clients"))
    archive = npm_archive()
    for source, content in ((MOBY_DICK, archive), (STATE_OF_THE_UNION, archive), (BIBLE, bible_archive(tmp_path))):
        monkeypatch.setitem(TEXTS, source.name, put(folder, source, content))
    return folder


def test_one_file_per_document(cache, tmp_path, capsys):
    documents = fetch_texts(tmp_path / "text", cache=cache)
    contents = {path.name: path.read_text() for path in documents}
    assert contents == {
        "moby-dick.txt": "CHAPTER 1. Loomings.\n\nCall me Ishmael.\n",
        "state-of-the-union-1790_george_washington_n.txt": "Fellow-Citizens — of the Senate\n",
        "state-of-the-union-1791_george_washington_n.txt": "Fellow-Citizens again\n",
        "king-james-bible-old-testament.txt": "Genesis\n\nIn the beginning\n\n"
        "And the earth was without form. And God said, Let there be light\n\nand there was light\n\n"
        "Exodus\n\nNow these are the names\n",
        "king-james-bible-new-testament.txt": "Matthew\n\nThe book of the generation\n",
    }
    spoken = capsys.readouterr()
    assert "left out austen" in spoken.err and "apt-get is not on this machine" in spoken.err
    assert "state-of-the-union: 2 documents" in spoken.out and "PDDL" in spoken.out
    facts = json.loads((tmp_path / "text" / "moby-dick.source.json").read_text())
    assert facts["licence"] == "CC0-1.0" and facts["documents"] == ["moby-dick.txt"]


def test_what_is_there_is_kept(cache, tmp_path, capsys):
    (path,) = fetch_texts(tmp_path / "text", ["moby-dick"], cache)
    path.write_text("edited")
    capsys.readouterr()
    assert fetch_texts(tmp_path / "text", ["moby-dick"], cache) == [path]
    assert path.read_text() == "edited" and capsys.readouterr().out == ""


def test_an_interrupted_source_is_written_again(cache, tmp_path, monkeypatch):
    good = texts._READERS["state-of-the-union"]

    def stops_after_one(source, archive):
        yield next(iter(good(source, archive)))
        raise KeyboardInterrupt

    monkeypatch.setitem(texts._READERS, "state-of-the-union", stops_after_one)
    with pytest.raises(KeyboardInterrupt):
        fetch_texts(tmp_path / "text", ["state-of-the-union"], cache)
    monkeypatch.setitem(texts._READERS, "state-of-the-union", good)
    assert len(fetch_texts(tmp_path / "text", ["state-of-the-union"], cache)) == 2


def test_refusals(cache, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown text source odyssey; choose from austen, moby-dick"):
        fetch_texts(tmp_path / "text", ["odyssey"], cache)
    with pytest.raises(UserError, match="none of austen could be fetched"):
        fetch_texts(tmp_path / "text", ["austen"], cache)
    monkeypatch.setitem(TEXTS, "king-james-bible", put(cache, BIBLE, b"not a wheel"))
    with pytest.raises(UserError, match="none of king-james-bible"):
        fetch_texts(tmp_path / "text", ["king-james-bible"], cache)
    assert not list((tmp_path / "text").glob("*.txt"))


def test_the_command_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, ROOT / "tools" / "fetch_assets.py", "--text", "--sources", "odyssey", "--output", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --sources: unknown text source odyssey") and result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "The Project Gutenberg EBook\nLicence\n\n*** START OF THE PROJECT GUTENBERG EBOOK EMMA ***\n\n\nEMMA\n\nBy Jane Austen\n\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK EMMA ***\nLicence again\n",
        "***START OF THIS PROJECT GUTENBERG EBOOK***\r\nEMMA\r\n\r\nBy Jane Austen\r\nEnd of Project Gutenberg's Emma\r\nLicence",
        "\n\nEMMA\n\nBy Jane Austen",
    ],
)
def test_publishers_licence_is_stripped(text):
    assert strip_licence(text) == "EMMA\n\nBy Jane Austen\n"
