"""What the machine can do and how much memory a process has used."""

from __future__ import annotations

import resource

import torch

PEAK_BF16_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12, "B200": 2250e12}
"""Dense bf16 FLOP/s of one GPU (vendor data sheets, without sparsity), by a part of its name; the first match counts."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of the device in FLOP/s, or None where no data sheet figure applies (CPU, unknown GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_BF16_FLOPS.items() if part in name), None)


def fast_precision() -> str:
    """`bf16` on GPUs and on CPUs whose oneDNN multiplies it (AVX-512, AMX), else `fp32`: elsewhere torch multiplies bf16 number by
    number (two cores with AVX2 alone: over 100 s a step of the demo, 14.5 s in fp32)."""
    if torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "bf16"
    return "fp32"


def note_on(precision: str) -> str | None:
    """What somebody who trains here in this precision should know first."""
    if precision == "bf16" and fast_precision() == "fp32":
        return "note: this CPU multiplies no bf16 (it has no AVX-512) and takes ten times as long: --set training.precision=fp32"
    return None


CPU_ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.arena_max=1",
    "THP_MEM_ALLOC_ENABLE": "1",
}
"""Environment of a rank on a CPU: glibc keeps what is freed for the next step, and it and torch ask for pages of 2 MB. glibc
reads it when a process starts, so ranks get it that launch() starts; under torchrun or srun export it yourself.

As they come, every large tensor is new memory that the kernel clears page by page: the same step of transformers' Trainer takes
16.9 s without and 14.0 s with this (benchmarks/results/step.json). A rank of the demo peaks at 7 GB instead of 5.5.
"""


def rank_environment() -> dict[str, str]:
    """What to start ranks of this machine with, besides their ranks. Empty where there is a GPU."""
    return {} if torch.cuda.is_available() else CPU_ALLOCATOR


def peak_memory_gb(device: torch.device) -> float:
    """Most memory used so far, in 10^9 bytes: allocated by torch on a GPU, resident set of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
