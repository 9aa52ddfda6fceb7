"""What the machine can do."""

from __future__ import annotations

import pytest
import torch

from endprompt.training.hardware import fast_precision, note_on


@pytest.mark.parametrize(("gpu", "bf16_products", "expected"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "fp32")])
def test_bf16_is_chosen_only_where_something_multiplies_it(monkeypatch, gpu, bf16_products, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: bf16_products)
    assert fast_precision() == expected
    assert (note_on("bf16") is not None) == (expected == "fp32") and note_on("fp32") is None


def test_this_cpu_is_asked():
    """Guards the name of torch's private operator: where it goes, this fails and the demo does not break at a user's."""
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported() in (True, False)
