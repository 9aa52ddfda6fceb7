"""Peak memory is a constant: it grows neither with the largest tensor nor with the number of layers."""

from __future__ import annotations

import pytest

from endprompt.checkpoint.safetensors_files import SafetensorsFolder
from tests.support.conversions import peak_memory
from tests.support.sparse import make_sparse_checkpoint

MB = 2**20
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 1024}
WIDE = {"num_hidden_layers": 1, "hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32768}
MODELS = {"few layers": {**SMALL, "num_hidden_layers": 2}, "80 layers": SMALL, "wide": WIDE}
"""wide: an embedding of 268 MB and a gate-and-up of 470 MB; 80 layers: as many tensors as LLaMA-3-70B, 723."""


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """(direction, model) -> bytes, and the largest tensor of each model."""
    place, found = tmp_path_factory.mktemp("memory"), {}
    for name, changes in MODELS.items():
        source, middle = place / name / "hf", place / name / "megatron"
        make_sparse_checkpoint(source, **changes)
        found["to megatron", name] = peak_memory("to megatron", source, middle, drop=True)
        found["to huggingface", name] = peak_memory("to huggingface", middle, place / name / "back", drop=True)
        found["largest", name] = max(info.bytes for info in SafetensorsFolder(source).tensors.values())
    assert len(SafetensorsFolder(place / "80 layers/hf").tensors) == 723
    return found


@pytest.mark.parametrize("direction", ["to megatron", "to huggingface"])
def test_memory_is_a_constant(direction, peaks):
    few, many, wide = (peaks[direction, name] for name in MODELS)
    for name in MODELS:
        assert peaks[direction, name] < 3 * peaks["largest", name] + 600 * MB
    assert many - few < 30 * MB, "the number of layers does not show"
    assert wide - few < 100 * MB, "nor do tensors of hundreds of MB: each thread has a block of 1 MB"
