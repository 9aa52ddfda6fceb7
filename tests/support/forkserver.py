"""Python's fork server, which is one for all tests of a process: whoever comes first decides what it has imported."""

from __future__ import annotations

import multiprocessing

PRELOAD = ["torch.distributed.checkpoint.filesystem", "transformers", "transformers.models.auto.tokenization_auto",
           "tests.support.conversions", "tests.support.preparation"]  # fmt: skip


def fork_context():
    """Processes that begin as copies of one that has imported what conversions and data preparation need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context
