"""One job on a run, and what is done to it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

from tests.slurm.cluster import PATIENCE
from tests.slurm.site import Run, Site
from tests.support.workspace import ROOT

STEPS, SAVE_INTERVAL = 60, 4
RUN_8B = f"training.steps={STEPS} output.save_interval={SAVE_INTERVAL}"


def history_without_slurm(site: Site, overrides: str) -> list[tuple[int, float]]:
    """(step, loss) of the 8B recipe on two ranks of this machine, without SLURM and without a break."""
    run = Run(site.path / "runs" / f"unbroken_{len(list(site.path.glob('runs/unbroken_*')))}")
    fields = [*site.environment(overrides)["OVERRIDES"].split(), f"output.directory={run.path}"]
    sets = [word for field in fields for word in ("--set", field)]
    command = [sys.executable, "ds_train.py", "--recipe", "recipes/llama3_8b_64k.yaml", "--nproc-per-node", "2", *sets]
    environment = {**site.environment(), **{name: str(site.settings[name]) for name in ("CHECKPOINTS", "DATA", "RUNS")}}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    return run.history


class Victim:
    """The 8B script with the tiny model on two nodes. options: of sbatch."""

    def __init__(self, site: Site, name: str, *options: str, save_interval: int = SAVE_INTERVAL, steps: int = STEPS):
        self.site, self.cluster, self.run, self.save_interval = site, site.cluster, site.run(name), save_interval
        overrides = f"training.steps={steps} output.save_interval={save_interval} output.directory={self.run.path}"
        self.job = site.submit("slurm/extend_8b_64k.sh", "--nodes=2", *options, overrides=overrides)

    def wait(self, condition: Callable[[], object], what: str) -> None:
        try:
            self.cluster.wait(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the run is at step {self.run.step}\n{self.site.log(self.job)[-4000:]}") from None

    def go_on(self, steps: int) -> None:
        """Until this attempt has logged `steps` steps more than the checkpoint it started from.

        The log holds later steps of the attempt before until this one cuts them off: hence the time of its last write.
        """

        def there() -> bool:
            if not self.starts or not (self.run.path / "log.jsonl").exists():
                return False
            start, written = self.starts[-1], (self.run.path / "log.jsonl").stat().st_mtime
            return written > start["time"] and start["step"] + steps <= self.run.step

        self.wait(there, f"{steps} steps of attempt {len(self.starts)}")

    @property
    def starts(self) -> list[dict]:
        return [event for event in self.run.attempts if event["event"] == "start"]

    def restarted(self, times: int) -> None:
        """Until the job has started `times` times more than once."""
        self.wait(lambda: len(self.starts) > times, f"restart {times}")

    @property
    def nodes(self) -> list[str]:
        return self.starts[-1]["nodes"]

    def rank_on(self, node: str) -> list[int]:
        """The rank itself, as the kernel would kill it when memory runs out, not the shell around it."""
        return self.cluster.processes(node, r"\S*python ds_train\.py --recipe")

    def training(self) -> None:
        """Until ranks of this attempt run, or the job has ended."""
        self.wait(lambda: self.starts and self.rank_on(self.nodes[0]) or self.ended, "ranks")

    @property
    def ended(self) -> bool:
        return self.cluster.job(self.job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")

    def while_saving(self) -> None:
        """Until a checkpoint is being written: for a few hundredths of a second, hence the short pauses between looks."""
        until = time.monotonic() + PATIENCE
        while not list(self.run.path.glob("checkpoints/*.incomplete")):
            assert time.monotonic() < until and not (self.run.path / "export").exists(), "no save was seen"
            time.sleep(0.002)
