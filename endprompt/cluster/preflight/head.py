"""The preflight's first part: everything that one machine can check before nodes are asked anything. No GPU, no cluster.

The engines' own `prepare` and `check_run_folder` do the work, as they will at the start of training. Where they fail they name
the first problem; the parts are then looked at one by one, so that a user mends all of them before queueing again.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from endprompt.atomic import write_json
from endprompt.cluster.preflight import machine, records
from endprompt.commands import ROOT
from endprompt.data.indexed import open_indexed
from endprompt.data.tokenizers import load_tokenizer
from endprompt.errors import EXIT_BAD_INPUT, UserError, from_os_error
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.models.layout import check_layout
from endprompt.planning import Cluster, make_plan
from endprompt.planning.plan import Engine, architecture_of
from endprompt.planning.search import remedy
from endprompt.recipe import Recipe, load_recipe
from endprompt.rope import scaling_for
from endprompt.training.checkpoints import check_disk, checkpoint_bytes, latest, missing_copies
from endprompt.training.prepare import Inputs, check_run_folder, check_weights, resolve_architecture, sample_builder
from endprompt.training.run_folder import RunFolder
from endprompt.zero3.config import micro_steps_per_step

GPU_MEMORY_GB = {"h100-80gb": 80.0, "h200-141gb": 141.0}
"""What the planner may fill of one GPU, in 10^9 bytes; its times are not asked for here, so memory is all that differs."""


@dataclass(frozen=True)
class Job:
    """What will run: the command line of `preflight.py head`. device: `cuda` or `cpu`. gpu: a name of GPU_MEMORY_GB."""

    recipe_file: str
    overrides: list[str]
    engine: Engine
    nodes: int
    processes_per_node: int
    device: str = "cuda"
    gpu: str = "h100-80gb"

    @property
    def ranks(self) -> int:
        return self.nodes * self.processes_per_node


@dataclass
class Checks:
    """Runs checks one after another; collects (name, words) of those that passed and the problem of each that did not."""

    passed: list[tuple[str, str]] = field(default_factory=list)
    problems: list[UserError] = field(default_factory=list)

    def run(self, name: str, check: Callable[[], str]) -> None:
        try:
            self.passed.append((name, check()))
        except (UserError, OSError) as problem:
            if isinstance(problem, OSError) and problem.errno is None:
                raise  # a library's own failure: a traceback is what helps
            self.add(problem if isinstance(problem, UserError) else from_os_error(problem))

    def add(self, problem: UserError) -> None:
        if str(problem) not in map(str, self.problems):
            self.problems.append(problem)


def head(job: Job, directory: Path | None) -> int:
    """Check, print, and write head.json when all is good. directory: of the records. Returns the exit code; raises UserError."""
    if directory is not None:
        records.make_empty(directory)  # first: records of an earlier preflight must not be taken for this one's
    recipe = load_recipe(job.recipe_file, job.overrides)
    checks = check(job, recipe)
    for name, words in checks.passed:
        print(f"ok  {name:<11} {words}", flush=True)
    for problem in checks.problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if checks.problems:
        return EXIT_BAD_INPUT
    if directory is not None:
        write_json(directory / records.HEAD, record(job, recipe))
        print(f"ok  {'records':<11} {directory / records.HEAD}")
    return 0


def record(job: Job, recipe: Recipe) -> dict:
    return {
        "token": os.urandom(8).hex(),
        "time": time.time(),
        "hostname": socket.gethostname(),
        "versions": machine.versions(),
        "commit": machine.commit(ROOT),
        "recipe": {"name": recipe.name, "fingerprint": recipe.fingerprint()},
        "run_folder": str(Path(recipe.output.directory).absolute()),
        "engine": job.engine,
        "nodes": job.nodes,
        "processes_per_node": job.processes_per_node,
    }


def check(job: Job, recipe: Recipe) -> Checks:
    """Every check of the job; none is left out because another failed."""
    checks = Checks([("recipe", f"{job.recipe_file}: {recipe.name}, fingerprint {recipe.fingerprint()}")])
    folder = RunFolder(recipe)
    try:
        inputs = prepare(job, recipe)
    except (UserError, OSError) as problem:
        inputs, first = None, problem if isinstance(problem, UserError) else from_os_error(problem)
        _look_closer(checks, job, recipe)
        checks.add(first)
    else:
        checks.passed += describe(job, recipe, inputs)
    if job.device == "cuda":
        checks.run("memory", lambda: check_memory(job, recipe))
    else:
        checks.passed.append(("memory", "not checked: the run is on CPUs, the planner predicts GPUs"))
    if inputs is not None:
        checks.run("run folder", lambda: (check_run_folder(recipe, inputs, folder, job.engine), describe_folder(recipe, inputs, folder))[1])
    else:
        checks.run("run folder", lambda: _check_folder_alone(recipe, folder))
    return checks


def prepare(job: Job, recipe: Recipe) -> Inputs:
    """What the engine itself does at its start, on every rank. Raises UserError."""
    if job.engine == "deepspeed":
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # unset on a login node, DeepSpeed warns that it found no GPU
        from endprompt.zero3.prepare import prepare as engine_prepare

        return engine_prepare(recipe, job.ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron-Core lists at import what is not installed; on a login node that is nobody's fault
        from megatron_patches.prepare import prepare as engine_prepare

        return engine_prepare(recipe, job.ranks)


def describe(job: Job, recipe: Recipe, inputs: Inputs) -> list[tuple[str, str]]:
    samples, data = recipe.steps * recipe.training.global_batch_size, inputs.train_data
    validation = f", validation {inputs.validation_data.samples_per_epoch:,}" if inputs.validation_data else ", no validation"
    return [
        ("checkpoint", f"{recipe.model.path} ({inputs.architecture.parameters / 1e9:.2f} B parameters, every tensor's header)"),
        ("tokenizer", f"{len(data.builder.prompts.prompts)} terminal prompt(s) written with it"),
        ("data", f"{samples:,} samples = {samples / data.samples_per_epoch:.2f} epochs of {data.samples_per_epoch:,}{validation}"),
        ("layout", _layout(job, recipe)),
    ]


def _layout(job: Job, recipe: Recipe) -> str:
    """Raises UserError where ranks or batch do not divide."""
    where = f"{job.nodes} node(s) x {job.processes_per_node} = {job.ranks} ranks"
    batch, micro = recipe.training.global_batch_size, recipe.training.micro_batch_size
    if job.engine == "deepspeed":
        return f"{where}: ZeRO-3, {batch} samples = {micro} x {micro_steps_per_step(recipe, job.ranks)} micro-steps x {job.ranks}"
    layout = check_layout(recipe, architecture_of(recipe), job.ranks)
    return f"{where}: {layout}, {batch} samples = {micro} x {layout.micro_steps} micro-steps x {layout.data}"


def check_memory(job: Job, recipe: Recipe) -> str:
    """Raises UserError where the planner says that it does not fit, with what the planner proposes."""
    memory = GPU_MEMORY_GB[job.gpu]
    plan = make_plan(recipe, job.engine, Cluster(job.nodes, job.processes_per_node, memory))
    if not plan.fits:
        problem, _, fix = remedy(plan).replace(" makes it ", ", which makes it ").partition("; ")
        where = f"{job.recipe_file}: {plan.layout_words}"
        raise UserError(where, f"{problem} (predicted for {job.gpu})", fix if fix.startswith(("use", "lower")) else f"use {fix}")
    host = f", {plan.host_gb_per_node:,.0f} GB of host memory a node" if plan.host_gb_per_node else ""
    return f"{plan.memory.total_gb:.1f} of {memory:g} GB a GPU{host}, predicted for {job.gpu}: {plan.layout_words}"


def describe_folder(recipe: Recipe, inputs: Inputs, folder: RunFolder) -> str:
    saved = latest(folder)
    start = f"resumes {saved.path.name}" if saved else "starts at step 0"
    free, each = shutil.disk_usage(folder.path).free, checkpoint_bytes(recipe, inputs.architecture.parameters)
    return f"{folder.path}: writable, {start}; checkpoints of {each / 1e9:.1f} GB, {free / 1e9:.0f} GB free"


def _look_closer(checks: Checks, job: Job, recipe: Recipe) -> None:
    """The parts of `prepare`, each by itself, so that one problem does not hide the next."""
    path = recipe.model.path
    parsed: dict = {}

    def config() -> str:
        parsed["config"] = load_hf_config(path)
        architecture = resolve_architecture(recipe, parsed["config"])
        scaling_for(recipe, rope_of_config(parsed["config"]))
        check_weights(path, architecture)
        return f"{path} ({architecture.parameters / 1e9:.2f} B parameters, every tensor's header)"

    def tokenizer() -> str:
        if "config" in parsed:
            return f"{len(sample_builder(recipe, parsed['config']['vocab_size']).prompts.prompts)} terminal prompt(s) written with it"
        load_tokenizer(path)
        return "loads"

    checks.run("checkpoint", config)
    checks.run("tokenizer", tokenizer)
    for source in [*recipe.data.train, *recipe.data.validation]:
        checks.run("data", lambda source=source: f"{source.path}: {open_indexed(source.path).num_tokens:,} tokens")
    checks.run("layout", lambda: _layout(job, recipe))


def _check_folder_alone(recipe: Recipe, folder: RunFolder) -> str:
    """What of `check_run_folder` needs no inputs. The size of a checkpoint is known where the recipe names its architecture."""
    folder.check_writable()
    folder.check_not_stopped()
    check_disk(folder, recipe, architecture_of(recipe).parameters, copies=missing_copies(folder, recipe))
    return f"{folder.path}: writable; what lies in it is compared once the inputs can be read"
