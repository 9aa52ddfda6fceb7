"""Where a converted checkpoint came from, and digests of its tensors that do not depend on the format or the layout."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from endprompt import __version__
from endprompt.atomic import write_json
from endprompt.checkpoint.digests import algorithm_of, digest_of
from endprompt.checkpoint.safetensors_files import TensorInfo
from endprompt.errors import UserError

CONVERSION = "endprompt_conversion.json"


def weights_digest(tensors: dict[str, TensorInfo], digests: dict[str, str]) -> str:
    """One digest for all weights: over name, dtype, shape and digest of every Hugging Face tensor, in the order of names.

    Equal for a Hugging Face folder, its Megatron checkpoint and any re-sharding of either.
    """
    lines = [f"{name} {tensors[name].dtype} {list(tensors[name].shape)} {digests[name]}\n" for name in sorted(digests)]
    return digest_of("".join(lines))


def record_conversion(
    folder: Path, direction: str, source: Path, tensors: dict[str, TensorInfo], digests: dict[str, str], **facts: Any
) -> str:
    """Write endprompt_conversion.json and return the digest of all weights.

    digests: of the bytes of every Hugging Face tensor, in the dtype it has in `tensors`.
    """
    digest = weights_digest(tensors, digests)
    entry = {
        "made_with": f"endprompt {__version__}", "direction": direction, "date": time.strftime("%Y-%m-%d"), "source": str(source),
        **facts, "weights_digest": digest, "tensors_digest": dict(sorted(digests.items())),
    }  # fmt: skip
    write_json(folder / CONVERSION, entry)
    return digest


def recorded_digests(folder: Path) -> dict[str, str]:
    """{tensor: "algorithm:hexadecimal"} that the conversion recorded when it wrote the folder; {} where none did. Raises UserError."""
    path = folder / CONVERSION
    if not path.is_file():
        return {}
    try:
        entry = json.loads(path.read_text())
        if "tensors_sha256" in entry:  # of a version whose digests did not name their algorithm
            return {name: f"sha256:{digest}" for name, digest in entry["tensors_sha256"].items()}
        recorded = dict(entry["tensors_digest"])
        for digest in recorded.values():
            algorithm_of(digest)
        return recorded
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "remove it; the digests recorded at the conversion are then not compared"
        raise UserError(path, f"cannot be read ({type(error).__name__}: {error})", fix) from None


def source_identity(folder: Path, files: list[str]) -> dict[str, Any]:
    """Name, size and modification time of files: what must be the same for a conversion to go on where it stopped."""
    stats = {file: (folder / file).stat() for file in files}
    return {"folder": str(folder.resolve()), **{file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()}}


def file_sha256(path: Path) -> str:
    """Of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
