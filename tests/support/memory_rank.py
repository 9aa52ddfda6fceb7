"""One rank of tests/planning/test_zero3_memory.py: train as ds_train.py does, and report the growth of anonymous memory.

memory_rank.py RECIPE OUT        writes OUT.<rank>.json: {"peak_gb", "by": {phase: peak within it}}, units of 10^9 bytes

Phases: load (weights read), engine (DeepSpeed's states), train (all steps). Imports, gloo and the data are in the baseline.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import torch

from tests.support.load_rank import Peak, anonymous_mb, status_mb

M_MMAP_THRESHOLD = -3


def main() -> None:
    from endprompt.recipe import load_recipe
    from endprompt.zero3.backend import init_distributed

    torch.set_num_threads(1)
    recipe = load_recipe(sys.argv[1])
    world = init_distributed()
    with world.left_at_the_end():
        phases = measure(recipe, world)
        Path(f"{sys.argv[2]}.{os.environ['RANK']}.json").write_text(json.dumps({"peak_gb": max(phases.values()), "by": phases}))


class Growth:
    """Growth of this process's anonymous memory since it was made, in 10^9 bytes: the peak within each phase that is run.

    Looks every 2 ms miss a peak where other processes take the CPU: once 9 MB of 70. The kernel's own high-water mark misses
    none, but counts pages of mapped files too, which only grow in a phase that maps no checkpoint.
    """

    def __init__(self):
        gc.collect()
        self._before, self.phases = anonymous_mb(), {}

    def phase(self, name: str, action, *, maps_files: bool = False):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the mark begins anew
        except OSError:  # a kernel or container without it: only looks are left
            maps_files = True
        peak = Peak()
        result = action()
        peak.done = True
        peak.join()
        highest = 0.0 if maps_files else status_mb("VmHWM") - status_mb("RssFile") - status_mb("RssShmem")
        self.phases[name] = (max(peak.mb, highest) - self._before) * 2**20 / 1e9
        return result


def saved_by_autograd(action, apart: set[int]) -> int:
    """Bytes of all unique storages that autograd saves while `action()` runs. apart: data pointers of those not to count."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        action()
    return sum(size for size, _ in kept.values())


def return_freed_blocks() -> None:
    """Give freed blocks above 256 KiB back at once.

    glibc keeps what it freed (blocks below 32 MiB) for the next step: measured up to half of the peak, which is the
    allocator's habit and no need of the training.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**18)


def measure(recipe, world) -> dict[str, float]:
    """The growth over what a rank of ds_train.py holds before the weights are read."""
    from transformers import AutoModelForCausalLM  # noqa: F401  (imported before the measurement begins)

    from endprompt.zero3.engine import build_engine
    from endprompt.zero3.load import load_model
    from endprompt.zero3.loop import Loop
    from endprompt.zero3.prepare import prepare

    prepared = prepare(recipe, world.size)
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))  # the math library's own buffers
    growth = Growth()
    model = growth.phase("load", lambda: load_model(recipe, prepared.config, prepared.rope, world), maps_files=True)
    return_freed_blocks()  # after loading, which sets the threshold itself
    engine = growth.phase("engine", lambda: build_engine(recipe, model, world.size, load_universal=False))
    loop = Loop(recipe, world, engine, prepared.train_data, None, save=lambda step: None, stop_reason=lambda: None, monitor=None)
    growth.phase("train", lambda: loop.run(0))
    return growth.phases


if __name__ == "__main__":
    main()
