"""Recorded digests name their algorithm: today's and those of older conversions are compared, others refused."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from endprompt.checkpoint.digests import ALGORITHM
from endprompt.checkpoint.provenance import CONVERSION, recorded_digests
from endprompt.checkpoint.verification import verify
from endprompt.checkpoint.verify import open_side
from endprompt.errors import UserError
from tests.support.checkpoints import make_family
from tests.support.conversions import convert


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    place = tmp_path_factory.mktemp("digests")
    convert("to megatron", make_family("llama3.1", place / "hf"), place / "megatron")
    convert("to huggingface", place / "megatron", place / "back")
    return place


def numbers(folder) -> dict[str, bytes]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor.view(torch.uint8).numpy().tobytes() for file in files for name, tensor in load_file(file).items()}


def as_old(folder) -> None:
    """The record as conversions wrote it before digests named their algorithm."""
    path = folder / CONVERSION
    entry = json.loads(path.read_text())
    del entry["weights_digest"], entry["tensors_digest"]
    entry["tensors_sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in numbers(folder).items()}
    path.write_text(json.dumps({**entry, "weights_sha256": "0" * 64}))


def differences(a, b) -> list[str]:
    sides = open_side(a), open_side(b)
    return verify(*sides, cast=False, tensors_only=True, positions=None, quiet=True)["checks"]["tensors"]


def test_record_is_of_the_bytes_of_each_tensor(good):
    expected = {name: f"xxh3_128:{xxhash.xxh3_128_hexdigest(data)}" for name, data in numbers(good / "hf").items()}
    assert ALGORITHM == "xxh3_128" and recorded_digests(good / "megatron") == recorded_digests(good / "back") == expected
    assert recorded_digests(good / "hf") == {}


def test_sha256_of_older_conversions_is_compared(good, tmp_path):
    shutil.copytree(good / "back", tmp_path / "old")
    as_old(tmp_path / "old")
    assert all(digest.startswith("sha256:") for digest in recorded_digests(tmp_path / "old").values())
    assert not differences(tmp_path / "old", good / "megatron")
    file = sorted((tmp_path / "old").glob("*.safetensors"))[0]
    with open(file, "r+b") as shard:
        shard.seek(-1, 2)
        last = shard.read(1)
        shard.seek(-1, 2)
        shard.write(bytes([last[0] ^ 1]))
    first, second = differences(tmp_path / "old", tmp_path / "old")  # of each side: only the record knows
    assert first == second and "is not what was written" in first


@pytest.mark.parametrize("digest", ["blake3:00", "0" * 64, 7, None])
def test_other_algorithms_are_refused(digest, good, tmp_path):
    shutil.copytree(good / "back", tmp_path / "new")
    path = tmp_path / "new" / CONVERSION
    entry = json.loads(path.read_text())
    entry["tensors_digest"]["model.norm.weight"] = digest
    path.write_text(json.dumps(entry))
    with pytest.raises(UserError, match=f"{CONVERSION}.*cannot be read.*remove it"):
        differences(good / "hf", tmp_path / "new")
