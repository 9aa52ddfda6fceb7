"""Whether a parallel layout divides a model and a batch: asked by the Megatron engine, the planner and the launchers alike."""

from __future__ import annotations

from dataclasses import dataclass

from endprompt.errors import UserError
from endprompt.models.architectures import Architecture
from endprompt.recipe import Recipe


@dataclass(frozen=True)
class Layout:
    """How `world_size` ranks share the work; made by `check_layout`. micro_steps: micro-batches a rank runs each step."""

    world_size: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    data: int
    sequence_parallel: bool
    micro_steps: int

    def __str__(self) -> str:
        tensor = f"TP {self.tensor}{' + SP' if self.sequence_parallel else ''}"
        parts = [tensor, f"PP {self.pipeline}", f"CP {self.context}", f"DP {self.data}"]
        if self.virtual > 1:
            parts.insert(2, f"VPP {self.virtual}")
        return " x ".join(parts)


def check_layout(recipe: Recipe, architecture: Architecture, world_size: int) -> Layout:
    """The recipe's Megatron layout on `world_size` ranks. Raises UserError naming the first number that does not divide."""
    m, n = recipe.megatron, recipe.positions.physical_length
    tensor, pipeline, virtual, context = m.tensor_parallel, m.pipeline_parallel, m.virtual_pipeline, m.context_parallel

    def divides(field: str, divisor: int, number: int, of: str) -> None:
        if number % divisor:
            raise UserError(f"recipe: megatron.{field}", f"{divisor} does not divide {of} {number}", f"choose a divisor of {number}")

    divides("tensor_parallel", tensor, architecture.kv_heads, "the key/value heads")
    divides("tensor_parallel", tensor, architecture.heads, "the attention heads")
    divides("tensor_parallel", tensor, architecture.ffn_size, "the feed-forward width")
    # Megatron would pad the vocabulary, and padded rows take part in its softmax: the loss would no longer be the model's.
    divides("tensor_parallel", tensor, architecture.vocab_size, "the vocabulary size")
    divides("pipeline_parallel", pipeline, architecture.layers, "the layers")
    if virtual > 1 and pipeline == 1:
        raise UserError(
            "recipe: megatron.virtual_pipeline", f"is {virtual} without pipeline stages", "set pipeline_parallel above 1 or this to 1"
        )
    if virtual > 1:
        divides("virtual_pipeline", virtual, architecture.layers // pipeline, "the layers of a stage,")
    if context > 1 and n % (2 * context):
        raise UserError(
            "recipe: megatron.context_parallel",
            f"{context} cuts a sequence into {2 * context} chunks, which does not divide positions.physical_length {n}",
            f"choose a length that {2 * context} divides, or another context_parallel",
        )
    sequence_parallel = m.sequence_parallel and tensor > 1
    if sequence_parallel and (n // context) % tensor:
        raise UserError(
            "recipe: megatron.sequence_parallel",
            f"cuts the {n // context} tokens of a context-parallel rank into {tensor}, which does not divide them",
            "choose a length that divides, or set it to false",
        )
    together = tensor * pipeline * context
    if world_size % together:
        raise UserError(
            "recipe: megatron",
            f"tensor_parallel {tensor} x pipeline_parallel {pipeline} x context_parallel {context} = {together} ranks do not divide "
            f"{world_size}",
            f"start a multiple of {together} ranks",
        )
    data = world_size // together
    per_micro_step, batch = recipe.training.micro_batch_size * data, recipe.training.global_batch_size
    if batch % per_micro_step:
        raise UserError(
            "recipe: training.global_batch_size",
            f"{batch} does not divide by micro_batch_size {recipe.training.micro_batch_size} x {data} data-parallel ranks = "
            f"{per_micro_step}",
            "change the number of ranks, micro_batch_size or global_batch_size",
        )
    micro_steps = batch // per_micro_step
    if virtual > 1 and micro_steps % pipeline:
        raise UserError(
            "recipe: megatron.virtual_pipeline",
            f"{virtual} chunks a stage need micro-batches in groups of {pipeline}; a step has {micro_steps} on each data-parallel rank",
            f"choose a batch that gives a multiple of {pipeline}, or set it to 1",
        )
    return Layout(world_size, tensor, pipeline, virtual, context, data, sequence_parallel, micro_steps)
