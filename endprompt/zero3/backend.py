"""Start torch.distributed for DeepSpeed: NCCL on GPUs, gloo on CPUs, without compiling anything and without noise."""

from __future__ import annotations

import os
import warnings
from datetime import timedelta

import torch

from endprompt.training.world import World


def init_distributed() -> World:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    Call it before anything else imports deepspeed. On a GPU the process takes the device LOCAL_RANK.
    """
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # unset on a CPU, it warns in every process
    # torch 2.13 deprecates calls that DeepSpeed makes at every collective; a run would drown in them.
    warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed
    import deepspeed.ops

    if not on_gpu:
        # An optional shared-memory all-reduce that would be compiled here: 36 to 161 s, and a crash without a C++
        # compiler. Losses are bit-equal without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Long enough for rank 0 to convert a 1 TB checkpoint or a slow disk to take one, while the others wait (default: 10 minutes).
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, timeout=timedelta(hours=2))
    return World.current()
