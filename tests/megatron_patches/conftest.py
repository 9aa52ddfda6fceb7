"""On a CPU later Megatron-Core releases cannot even be imported without a stand-in for triton."""

import pytest
import torch

import megatron_patches
from megatron_patches import cpu_backend

if not torch.cuda.is_available():
    cpu_backend.stand_in_for_triton()


@pytest.fixture(autouse=True)
def unpatched():
    """No patch outlives its test."""
    yield
    megatron_patches.remove()
