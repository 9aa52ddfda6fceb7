"""One rank of tests/zero3/test_load.py: load a checkpoint under ZeRO-3, watching anonymous memory, and compare it with the files.

load_rank.py RECIPE OUT        writes OUT.<rank>.json
"""

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path

import torch


def anonymous_mb() -> float:
    """Anonymous resident memory: what was allocated and copied. Mapped checkpoint pages are the page cache's and can be dropped at will."""
    return status_mb("RssAnon")


def status_mb(field: str) -> float:
    """Of /proc/self/status, in MiB."""
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(f"{field}:"))


class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.mb, self.done = anonymous_mb(), False
        self.start()

    def run(self):
        while not self.done:
            self.mb = max(self.mb, anonymous_mb())
            time.sleep(0.002)


def main() -> None:
    from endprompt.recipe import load_recipe
    from endprompt.zero3.backend import init_distributed

    torch.set_num_threads(1)
    recipe = load_recipe(sys.argv[1])
    world = init_distributed()
    with world.left_at_the_end():
        work(recipe, world)


def work(recipe, world) -> None:
    import deepspeed
    from transformers import AutoModelForCausalLM  # noqa: F401  (imported before the measurement begins)

    from endprompt.checkpoint.weights import WeightFiles
    from endprompt.models.hf_config import load_hf_config, rope_of_config
    from endprompt.rope import scaling_for
    from endprompt.zero3.load import load_model
    from endprompt.zero3.model import hf_name

    config = load_hf_config(recipe.model.path)
    rope = scaling_for(recipe, rope_of_config(config))
    gc.collect()
    before, peak = anonymous_mb(), Peak()
    model = load_model(recipe, config, rope, world)
    peak.done = True
    partition = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters()) / 2**20
    largest = max(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters()) / 2**20
    whole = sum(p.ds_numel * p.ds_tensor.element_size() for p in model.parameters()) / 2**20

    files, different = WeightFiles(recipe.model.path), []
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            stored = files.read_flat(hf_name(name), 0, parameter.ds_numel).to(parameter.dtype)
            if not torch.equal(parameter.data.reshape(-1), stored):
                different.append(name)
    facts = {"grown": peak.mb - before, "partition": partition, "largest_slice": largest, "whole": whole, "different": different}
    facts |= {"names": len(list(model.parameters())), "rope_dtype": str(model.model.get_decoder().rotary_emb.inv_freq.dtype)}
    Path(f"{sys.argv[2]}.{os.environ['RANK']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
