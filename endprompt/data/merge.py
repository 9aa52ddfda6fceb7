"""Joining parts into the finished dataset: documents are numbered, split, copied, and renamed into place."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

import endprompt
from endprompt.atomic import atomic_file, sync_path, write_json
from endprompt.data.indexed import bin_path, idx_path, index_bytes
from endprompt.data.shards import Part
from endprompt.data.shuffle import hash_numbers
from endprompt.data.sidecar import read_sidecar, sidecar_path
from endprompt.errors import UserError

RENAMING = "renaming.json"
"""In the folder of parts: the settings of the job whose outputs are being put in place."""


@dataclass(frozen=True)
class Split:
    """Which documents go to validation: a pure function of (seed, document number). At most one of the two is set.

    fraction: every document by itself, with this probability. documents: exactly so many of the corpus.
    """

    seed: int = 42
    validation_fraction: float | None = None
    validation_documents: int | None = None

    def __post_init__(self):
        if self.validation_fraction is not None and self.validation_documents is not None:
            raise UserError("--validation-fraction", "cannot go with --validation-documents", "give one of them")
        if self.validation_fraction is not None and not 0 < self.validation_fraction < 1:
            raise UserError("--validation-fraction", f"{self.validation_fraction} is not between 0 and 1", "give for instance 0.01")
        if self.validation_documents is not None and self.validation_documents < 1:
            raise UserError("--validation-documents", f"{self.validation_documents} is below 1", "leave it out for no validation set")

    @property
    def wanted(self) -> bool:
        return self.validation_fraction is not None or self.validation_documents is not None

    def validation_mask(self, documents: int) -> np.ndarray:
        """bool [documents], True where a document is for validation. Raises UserError where a side would be empty."""
        mask = np.zeros(documents, dtype=bool)
        if not self.wanted:
            return mask
        hashes = hash_numbers(f"validation {self.seed}", documents)
        if self.validation_fraction is not None:
            mask = hashes < np.uint64(self.validation_fraction * 2**64)
            if mask.all() or not mask.any():
                empty = "training" if mask.all() else "validation"
                raise UserError(
                    "--validation-fraction",
                    f"{self.validation_fraction:g} of {documents} documents leaves none for {empty}",
                    "change it, or say how many with --validation-documents",
                )
            return mask
        if self.validation_documents >= documents:
            raise UserError(
                "--validation-documents", f"{self.validation_documents} of {documents} documents leaves none for training", "lower it"
            )
        mask[np.argsort(hashes, kind="stable")[: self.validation_documents]] = True
        return mask


def output_prefixes(output: str, split: Split) -> dict[str, Path]:
    """Prefixes of the datasets to write, by the name of their role."""
    if split.wanted:
        return {"train": Path(f"{output}_train"), "validation": Path(f"{output}_validation")}
    return {"all": Path(output)}


def finished_outputs(outputs: dict[str, Path], settings: dict) -> bool:
    """Whether every output is there, whole, and made by these settings."""
    for prefix in outputs.values():
        sidecar = read_sidecar(prefix)
        if sidecar is None or sidecar.get("settings") != settings:
            return False
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file() or path.stat().st_size != sidecar["sizes"][path.suffix]:
                return False
    return True


def refuse_existing(outputs: dict[str, Path], parts: Path, settings: dict) -> None:
    """Raise UserError where an output exists, unless it is what a killed run of this very job had renamed already."""
    try:
        if json.loads((parts / RENAMING).read_text()) == settings:
            return
    except (FileNotFoundError, ValueError):
        pass  # no run of this job came so far; below, any output is somebody else's
    for prefix in outputs.values():
        for path in (bin_path(prefix), idx_path(prefix), sidecar_path(prefix)):
            if path.exists():
                raise UserError(path, "exists already", "choose another --output, remove it, or give --overwrite")


@dataclass
class _Output:
    """One dataset in the making."""

    file: IO[bytes]
    lengths: list[np.ndarray] = field(default_factory=list)
    text_bytes: int = 0
    max_token_id: int = 0

    def add(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        self.file.write(tokens)
        self.lengths.append(lengths)
        self.text_bytes += text_bytes
        self.max_token_id = max(self.max_token_id, int(tokens.max(initial=0)))


def merge_parts(
    parts: list[Part], folder: Path, outputs: dict[str, Path], split: Split, max_documents: int | None, dtype: np.dtype,
    settings: dict, facts: dict,
) -> None:  # fmt: skip
    """Write the outputs from the parts and rename them into place. Raises UserError if there is no document."""
    documents = sum(part.documents for part in parts)
    kept = min(documents, max_documents or documents)
    if kept == 0:
        skipped = sum(part.empty for part in parts)
        raise UserError("--input", f"holds no documents ({skipped} empty ones skipped)", "give text, and --text-field if it is elsewhere")
    mask = split.validation_mask(kept)
    empty = first = 0
    bar = tqdm(total=kept, unit=" documents", unit_scale=True, desc="joining", disable=not sys.stderr.isatty())
    with bar, ExitStack() as files:
        opened = {role: _Output(files.enter_context(atomic_file(folder / f"{role}.bin", "wb"))) for role in outputs}
        sides = (opened.get("train") or opened.get("all"), opened.get("validation"))
        for part in parts:
            part_mask = mask[first : first + part.documents]
            if first < kept:
                _copy(part, folder, dtype, part_mask, sides)
                empty += part.empty
            first += part.documents
            bar.update(len(part_mask))
    for role, output in opened.items():
        with atomic_file(folder / f"{role}.idx", "wb") as file:
            file.writelines(index_bytes(np.concatenate(output.lengths), dtype))
    sidecars = {role: _sidecar(role, folder, output, dtype, empty, settings, facts) for role, output in opened.items()}
    _rename(folder, outputs, sidecars, settings)


def _copy(part: Part, folder: Path, dtype: np.dtype, mask: np.ndarray, sides: tuple[_Output | None, _Output | None]) -> None:
    """Append the first len(mask) documents of a part to training (mask False) or validation, run by run."""
    if not len(mask):
        return
    lengths, text_bytes = (array[: len(mask)] for array in part.lengths(folder, dtype))
    tokens = np.memmap(part.path(folder), dtype=dtype, mode="r", shape=(part.tokens,)) if part.tokens else np.empty(0, dtype)
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    runs = np.concatenate([[0], np.flatnonzero(np.diff(mask)) + 1, [len(mask)]])
    for a, b in zip(runs, runs[1:], strict=False):
        side = sides[int(mask[a])]
        side.add(tokens[starts[a] : starts[b]], lengths[a:b], int(text_bytes[a:b].sum(dtype=np.int64)))


def _sidecar(role: str, folder: Path, output: _Output, dtype: np.dtype, empty: int, settings: dict, facts: dict) -> dict:
    lengths = np.concatenate(output.lengths)
    tokens = int(lengths.sum(dtype=np.int64))
    return {
        "made_by": f"endprompt {endprompt.__version__}",
        "role": role,
        "documents": len(lengths),
        "tokens": tokens,
        "text_bytes": output.text_bytes,
        "bytes_per_token": round(output.text_bytes / tokens, 4),
        "longest_document": int(lengths.max()),
        "empty_documents_skipped": empty,
        "max_token_id": output.max_token_id,
        "dtype": dtype.name,
        **facts,
        "sizes": {suffix: (folder / f"{role}{suffix}").stat().st_size for suffix in (".bin", ".idx")},
        "settings": settings,
    }


def _rename(folder: Path, outputs: dict[str, Path], sidecars: dict[str, dict], settings: dict) -> None:
    """Put the outputs in place. A reader sees the old dataset, none (index missing), or the new one, never a mixture."""
    for role, sidecar in sidecars.items():
        write_json(folder / f"{role}.json", sidecar)
    write_json(folder / RENAMING, settings)
    for prefix in outputs.values():
        sidecar_path(prefix).unlink(missing_ok=True)
        idx_path(prefix).unlink(missing_ok=True)
    for role, prefix in outputs.items():
        os.replace(folder / f"{role}.bin", bin_path(prefix))
        os.replace(folder / f"{role}.idx", idx_path(prefix))
    for role, prefix in outputs.items():
        os.replace(folder / f"{role}.json", sidecar_path(prefix))
        sync_path(prefix.parent)
