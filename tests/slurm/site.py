"""A site of a test cluster: its shared folders, its cluster.env, a tiny model under the real checkpoints' names, and jobs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from tests.slurm.cluster import Cluster
from tests.support.tiny import PARAGRAPH, make_tiny_checkpoint
from tests.support.workspace import ROOT, quiet_environment, read_log

TINY = (
    "model.architecture=custom model.original_length=128 target_length=1024 positions.physical_length=64 "
    "positions.displaced_length=12 data.validation_samples=4 training.tokens=null training.global_batch_size=4 "
    "training.micro_batch_size=1 training.learning_rate=1e-3 training.warmup_steps=2 training.precision=fp32 "
    "output.export_dtype=fp32 output.validation_interval=1000 output.keep_last=2"
)
"""The one variable (OVERRIDES) that makes a script's run tiny; steps, layout and save interval are each test's own."""


class Site:
    """cluster.env, folders and corpus under `path`; scripts are submitted from the clone's root, as users do."""

    def __init__(self, path: Path, cluster: Cluster):
        self.path, self.cluster = path, cluster
        for name in ("checkpoints", "data", "runs", "logs"):
            (path / name).mkdir()
        corpus = path / "corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": f"Chapter {n}. {PARAGRAPH} {PARAGRAPH}"}) + "\n" for n in range(300)))
        self.settings = {
            "SBATCH_PARTITION": "h100", "CHECKPOINTS": path / "checkpoints", "DATA": path / "data", "RUNS": path / "runs",
            "PYTHON": sys.executable, "DEVICE": "cpu", "PROCESSES_PER_NODE": "1", "CORPUS": corpus, "HANG_TIMEOUT": "240",
            "EVALUATE": "no",
        }  # fmt: skip
        self.write_settings()

    @property
    def env_file(self) -> Path:
        return self.path / "cluster.env"

    def write_settings(self, **changed) -> None:
        self.settings.update(changed)
        self.env_file.write_text("".join(f"{name}={shlex.quote(str(value))}\n" for name, value in self.settings.items()))

    def environment(self, overrides: str = "", **variables: str) -> dict[str, str]:
        return {
            **self.cluster.environment, **quiet_environment(), "SLURM_CONF": self.cluster.environment["SLURM_CONF"],
            "CLUSTER_ENV": str(self.env_file), "OVERRIDES": f"{TINY} {overrides}", **variables,
        }  # fmt: skip

    def make_model(self, name: str = "Meta-Llama-3-8B") -> Path:
        folder = self.path / "checkpoints" / name
        if not folder.exists():
            make_tiny_checkpoint(folder, max_position_embeddings=128, num_hidden_layers=4)
        return folder

    def make_data(self) -> None:
        """What slurm/prepare.sh would write, without a job."""
        if not (self.path / "data" / "llama3_train.idx").exists():
            model = self.make_model()
            command = ["tools/prepare_data.py", "--input", self.settings["CORPUS"], "--tokenizer", model,
                       "--output", self.path / "data" / "llama3", "--validation-documents", "20", "--workers", "1"]  # fmt: skip
            subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True)

    def bash(self, *command: str, overrides: str = "", **variables: str) -> subprocess.CompletedProcess:
        environment = self.environment(overrides, **variables)
        return subprocess.run(["bash", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    def submit(self, script: str, *options: str, overrides: str = "", **variables: str) -> str:
        """sbatch a script; returns the job's number. options: of sbatch; without a dash, of the script. The log goes to the site."""
        log = f"--output={self.path}/logs/%x-%j.log"
        arguments = [option for option in options if not option.startswith("-")]
        command = ["sbatch", "--parsable", log, *(option for option in options if option.startswith("-")), script, *arguments]
        environment = self.environment(overrides, **variables)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def log(self, job: str) -> str:
        return "".join(file.read_text() for file in (self.path / "logs").glob(f"*-{job}.log"))

    def run(self, name: str) -> Run:
        return Run(self.path / "runs" / name)

    def wait_for(self, job: str, state: str) -> None:
        """Until the job's state is `state`; says what its log says if it ends otherwise or not in time."""
        ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"]

        def there() -> bool:
            now = self.cluster.job(job)["JobState"]
            assert now == state or now not in ended, f"job {job} is {now}, wanted {state}\n{self.log(job)[-4000:]}"
            return now == state

        try:
            self.cluster.wait(there, f"job {job} is {state}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log(job)[-4000:]}") from None


class Run:
    """What a run folder says."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def step(self) -> int:
        """Of the last whole line of the log, 0 for none."""
        try:
            lines = (self.path / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return 0
        steps = [int(found[1]) for line in lines if (found := re.match(r'\{"step": (\d+).*\}$', line))]
        return steps[-1] if steps else 0

    @property
    def history(self) -> list[tuple[int, float]]:
        """(step, loss) of every logged step, in the order of the log."""
        return [(entry["step"], entry["loss"]) for entry in read_log(self.path) if "loss" in entry]

    @property
    def attempts(self) -> list[dict]:
        if not (self.path / "attempts.jsonl").exists():
            return []
        return [json.loads(line) for line in (self.path / "attempts.jsonl").read_text().splitlines()]

    @property
    def reasons(self) -> list[str]:
        return [event["reason"] for event in self.attempts if event["event"] == "end"]

    @property
    def state(self) -> str:
        return json.loads((self.path / "status.json").read_text())["state"]


def signal_batch(cluster: Cluster, job: str) -> None:
    """What SLURM does before a time limit and a preemption (--signal=B:USR1@...): USR1 to the batch script alone."""
    cluster.output("scancel", "--batch", "--signal=USR1", job)


def kill(processes: list[int]) -> None:
    for process in processes:
        os.kill(process, 9)
