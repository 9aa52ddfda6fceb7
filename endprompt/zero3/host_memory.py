"""Keep the host heap from fragmenting while a model is built tensor by tensor."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_M_MMAP_THRESHOLD = -3
_LARGEST = 32 * 2**20
"""glibc never lets its own threshold grow beyond this (DEFAULT_MMAP_THRESHOLD_MAX on 64-bit)."""


@contextmanager
def tensors_returned_to_the_system() -> Iterator[None]:
    """Within the block glibc maps every allocation above 1 MiB by itself, so that freeing it gives the memory back.

    zero.Init makes each parameter whole, keeps a slice and frees the rest. glibc raises its mapping threshold to the
    largest block freed so far, so these come from the heap, slices settle between the freed blocks, and the holes stay
    resident: measured 490 MB beyond a partition of 743 MB. Afterwards the threshold is the highest glibc would choose,
    because training frees and takes large blocks all the time. Other C libraries are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
