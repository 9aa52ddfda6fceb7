"""One recipe on one cluster under one engine: everything that is predicted for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from endprompt.errors import UserError
from endprompt.models.architectures import CUSTOM, Architecture, architecture_of_config, get_architecture, training_flops_per_token
from endprompt.models.layout import Layout, check_layout
from endprompt.planning.calibration import efficiencies
from endprompt.planning.cluster import Cluster
from endprompt.planning.megatron_memory import megatron_memory
from endprompt.planning.memory import GB, Memory
from endprompt.planning.speed import Seconds, megatron_seconds, zero3_seconds
from endprompt.planning.zero3_memory import zero3_memory
from endprompt.recipe import Recipe
from endprompt.training.checkpoints import checkpoint_bytes
from endprompt.zero3.config import micro_steps_per_step, offload_device, read_situation

Engine = Literal["deepspeed", "megatron"]
ENGINES: tuple[Engine, ...] = ("deepspeed", "megatron")


@dataclass(frozen=True)
class Plan:
    """Predictions for a recipe. layout: Megatron's, None under ZeRO-3. memory: of the fullest GPU. Times in seconds."""

    recipe: Recipe
    engine: Engine
    cluster: Cluster
    architecture: Architecture
    layout: Layout | None
    micro_steps: int
    memory: Memory
    seconds: Seconds

    @property
    def fits(self) -> bool:
        return self.memory.total_gb <= self.cluster.memory_gb and self.host_gb_per_node <= self.cluster.host_memory_gb

    @property
    def host_gb_per_node(self) -> float:
        """Pinned host memory of all ranks of a node (offloading)."""
        return self.memory.host_gb * self.cluster.gpus_per_node

    @property
    def flops_per_token(self) -> float:
        """Forward and backward, causal, without recomputation (`training_flops_per_token`)."""
        return training_flops_per_token(self.architecture, self.recipe.positions.physical_length)

    @cached_property
    def step_seconds(self) -> float:
        return self.seconds.total(efficiencies(self.engine))

    @property
    def tokens_per_second(self) -> float:
        return self.recipe.tokens_per_step / self.step_seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over dense bf16 peak."""
        return self.tokens_per_second * self.flops_per_token / (self.cluster.gpus * self.cluster.peak_flops)

    @property
    def hours(self) -> float:
        """Of training alone: loading, saving, validation and queueing come on top."""
        return self.step_seconds * self.recipe.steps / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.cluster.gpus

    @property
    def checkpoint_gb(self) -> float:
        return checkpoint_bytes(self.recipe, self.architecture.parameters) / GB

    @property
    def disk_gb(self) -> float:
        """Kept checkpoints, one being written, and the exported weights."""
        export = self.architecture.parameters * (2 if self.recipe.output.export_dtype == "bf16" else 4) / GB
        return (self.recipe.output.keep_last + 1) * self.checkpoint_gb + export

    @property
    def layout_words(self) -> str:
        return str(self.layout) if self.layout else f"ZeRO-3 over {self.cluster.gpus} GPUs"


def architecture_of(recipe: Recipe) -> Architecture:
    """By the recipe's name, or from the checkpoint's config.json for `custom`. Raises UserError."""
    if recipe.model.architecture != CUSTOM:
        return get_architecture(recipe.model.architecture)
    from endprompt.models.hf_config import load_hf_config

    return architecture_of_config(load_hf_config(recipe.model.path))


def make_plan(recipe: Recipe, engine: Engine, cluster: Cluster) -> Plan:
    """Predict. Raises UserError where the layout or the batch does not divide, as the engine itself would at its start."""
    architecture = architecture_of(recipe)
    if engine == "deepspeed":
        return _deepspeed(recipe, cluster, architecture)
    return _megatron(recipe, cluster, architecture)


def _deepspeed(recipe: Recipe, cluster: Cluster, architecture: Architecture) -> Plan:
    situation, training, length = read_situation(recipe), recipe.training, recipe.positions.physical_length
    micro_steps = micro_steps_per_step(recipe, cluster.gpus)
    memory = zero3_memory(
        architecture, length, training.micro_batch_size, cluster, situation,
        precision=training.precision, checkpointing=training.activation_checkpointing,
    )  # fmt: skip
    seconds = zero3_seconds(
        architecture, length, training.micro_batch_size, micro_steps, "full" if training.activation_checkpointing else "none", cluster,
        offload_optimizer=offload_device(situation, "offload_optimizer") != "none",
        offload_parameters=offload_device(situation, "offload_param") != "none",
    )  # fmt: skip
    return Plan(recipe, "deepspeed", cluster, architecture, None, micro_steps, memory, seconds)


def _megatron(recipe: Recipe, cluster: Cluster, architecture: Architecture) -> Plan:
    m, training, length = recipe.megatron, recipe.training, recipe.positions.physical_length
    layout = check_layout(recipe, architecture, cluster.gpus)
    if layout.tensor > cluster.gpus_per_node:
        raise UserError(
            "recipe: megatron.tensor_parallel",
            f"{layout.tensor} reaches beyond the {cluster.gpus_per_node} GPUs of a node",
            f"set it to at most {cluster.gpus_per_node}",
        )
    memory = megatron_memory(
        architecture, length, training.micro_batch_size, cluster, layout,
        recompute=recipe.megatron_recompute, distributed_optimizer=m.distributed_optimizer, precision=training.precision,
    )  # fmt: skip
    seconds = megatron_seconds(
        architecture, length, training.micro_batch_size, layout.micro_steps, recipe.megatron_recompute, cluster,
        tensor=layout.tensor, pipeline=layout.pipeline, virtual=layout.virtual, context=layout.context, data=layout.data,
        distributed_optimizer=m.distributed_optimizer, overlap=m.overlap,
    )  # fmt: skip
    return Plan(recipe, "megatron", cluster, architecture, layout, layout.micro_steps, memory, seconds)
