"""Start a Megatron run again and again, killing each start at a random moment of its first save, at the cost of one import.

forked_runs.py RECIPE KILLS SEED OVERRIDE...      prints one JSON object: how often the pointer had moved when the kill came

Every start is a fork of this process, which has imported everything and initialised nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def main() -> None:
    kills, moments, overrides = int(sys.argv[2]), random.Random(int(sys.argv[3])), sys.argv[4:]
    from megatron_patches import cpu_backend

    cpu_backend.stand_in_for_triton()
    import megatron.core  # noqa: F401
    import torch

    import megatron_patches.checkpoints  # noqa: F401
    import megatron_patches.model  # noqa: F401
    from endprompt.recipe import load_recipe

    torch.set_num_threads(1)
    recipe = load_recipe(sys.argv[1], overrides)
    checkpoints = Path(recipe.output.directory) / "checkpoints"

    def pointer() -> str:
        return (checkpoints / "latest").read_text().strip() if (checkpoints / "latest").exists() else ""

    def writing_since(moment: float) -> bool:
        """Tensors are on their way to the disk; before that the writer's helpers take seconds to start."""
        with contextlib.suppress(FileNotFoundError):  # a folder renamed while it was listed, or a file before it was looked at
            return any(path.stat().st_mtime > moment for path in checkpoints.glob("step_*.incomplete/*.distcp"))
        return False

    moved, whole = 0, True
    for _ in range(kills):
        before, started = pointer(), time.time()
        child = start(recipe)
        try:
            while not writing_since(started):
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the run ended before its first save"
                assert time.time() < started + 120, "no save began"
                time.sleep(0.002)
            time.sleep(moments.uniform(0, 4))
        finally:
            # With the helpers that the checkpoint writer has started, and whatever went wrong: one that is left would keep our pipes.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        whole = whole and pointer() >= before and (not pointer() or (checkpoints / pointer() / "state.json").exists())
        moved += pointer() > before
    print(json.dumps({"moved": moved, "whole": whole}))


def start(recipe) -> int:
    child = os.fork()
    if child:
        return child
    from endprompt.training.launch import become_single_process
    from megatron_patches.train import train

    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    become_single_process()
    try:
        os._exit(train(recipe))
    except BaseException as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


if __name__ == "__main__":
    main()
