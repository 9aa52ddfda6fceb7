"""A complete tiny run in a folder: checkpoint, corpora, recipe; and training started on it as a user would."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml

from endprompt.data.indexed import write_indexed
from endprompt.recipe import Recipe, load_recipe
from tests.support import warm
from tests.support.recipes import TINY
from tests.support.tiny import make_tiny_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent

DEEPSPEED = [sys.executable, str(ROOT / "ds_train.py")]
MEGATRON = [sys.executable, "-W", "ignore", "-m", "megatron_patches.train"]


class Workspace:
    """path: its folder. Recipe fields are changed with dotted overrides, as `--set` does. model: LlamaConfig fields.

    entry: the command that trains, ds_train.py unless it is set to another (`MEGATRON`).
    """

    def __init__(self, path: Path, **model):
        self.path, self.entry = path, DEEPSPEED
        self.model = path / "model"
        make_tiny_checkpoint(self.model, max_position_embeddings=128, **model)
        vocabulary = json.loads((self.model / "config.json").read_text())["vocab_size"]
        random = np.random.default_rng(7)
        for name, documents in (("train", 40), ("validation", 8)):
            lengths = random.integers(100, 400, size=documents)
            write_indexed(path / f"corpus_{name}", [random.integers(5, vocabulary, size=n) for n in lengths], dtype=np.uint16)
        raw = yaml.safe_load(TINY.read_text())
        raw["model"]["path"] = str(self.model)
        raw["data"]["train"][0]["path"] = str(path / "corpus_train")
        raw["data"]["validation"][0]["path"] = str(path / "corpus_validation")
        raw["output"]["directory"] = str(path / "run")
        self.recipe_file = path / "recipe.yaml"
        self.recipe_file.write_text(yaml.safe_dump(raw))

    def recipe(self, **overrides) -> Recipe:
        return load_recipe(self.recipe_file, [f"{field}={value}" for field, value in overrides.items()])

    def command(self, *arguments: str, ranks: int = 2, **overrides) -> list[str]:
        sets = [word for field, value in overrides.items() for word in ("--set", f"{field}={value}")]
        return [*self.entry, "--recipe", str(self.recipe_file), "--nproc-per-node", str(ranks), *sets, *arguments]

    def start(self, *arguments: str, ranks: int = 2, cold: bool = False, **overrides) -> subprocess.Popen | warm.Warm:
        """`entry` in a process group of its own, so that a test can kill launcher and ranks at one stroke.

        cold: a new interpreter, as a user starts it; else, where that is possible, one that has its imports behind it.
        """
        command = self.command(*arguments, ranks=ranks, **overrides)
        if not cold and warm.usable():
            address = warm.address_of("deepspeed" if self.entry is DEEPSPEED else "megatron")
            return warm.Warm(address, command, cwd=ROOT, env=quiet_environment())
        return subprocess.Popen(
            command, cwd=ROOT, env=quiet_environment(), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def train(self, *arguments: str, ranks: int = 2, expect: int = 0, cold: bool = False, **overrides) -> subprocess.CompletedProcess:
        process = self.start(*arguments, ranks=ranks, cold=cold, **overrides)
        try:
            finished = subprocess.CompletedProcess(process.args, None, *process.communicate(timeout=300))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finished.returncode = process.returncode
        assert finished.returncode == expect, f"exit {finished.returncode}, expected {expect}\n{finished.stdout}\n{finished.stderr}"
        return finished


def quiet_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}


def read_log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in read_log(run) if "loss" in entry]
