"""Run folders made by hand, for what reads them."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import yaml

from endprompt.cluster.status import Status, read

BEGAN = 1_764_053_000.0
TOKENS = 1000
"""Tokens of a step."""


class Folder:
    """A run folder made by hand. Steps take 10 s; the clock says `now`."""

    def __init__(self, path: Path):
        self.path, self.now, self.step = path, BEGAN, 0
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(yaml.safe_dump({"name": "tiny", "output": {"save_interval": 10}}))

    def status(self, **facts) -> None:
        path = self.path / "status.json"
        old = json.loads(path.read_text()) if path.exists() else {}
        stamp = datetime.fromtimestamp(self.now, UTC).strftime("%Y-%m-%dT%H:%M:%S%z")
        path.write_text(json.dumps({"steps": 100, "starts": 1, **old, **facts, "updated": stamp}))

    def steps(self, number: int, seconds: float = 10.0, wait: float = 0.0) -> None:
        """`number` more steps; before the first one `wait` seconds pass."""
        self.now += wait
        for _ in range(number):
            self.step, self.now = self.step + 1, self.now + seconds
            self.log(
                step=self.step, loss=3 - self.step / 100, tokens=self.step * TOKENS, tokens_per_second=TOKENS / seconds,
                step_seconds=seconds, mfu=0.4, time=self.now,
            )  # fmt: skip
        self.status(state="running", step=self.step)

    def log(self, **entry) -> None:
        self._append("log.jsonl", entry)

    def event(self, event: str, **facts) -> None:
        self._append("attempts.jsonl", {"event": event, "time": self.now, "job": "123", "restart": 0, **facts})

    def _append(self, name: str, entry: dict) -> None:
        with open(self.path / name, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def save(self, step: int, size: int = 5000) -> None:
        path = self.path / "checkpoints" / f"step_{step:08d}"
        (path / "tensors").mkdir(parents=True)
        (path / "tensors" / "rank_0").write_bytes(bytes(size))
        (path / "state.json").write_text("{}")
        os.utime(path / "state.json", (self.now, self.now))
        (self.path / "checkpoints" / "latest").write_text(path.name + "\n")

    def read(self, later: float = 0.0) -> Status:
        return read(self.path, self.now + later)
