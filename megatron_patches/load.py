"""Fill this rank's parameters straight from a Hugging Face checkpoint: no conversion beforehand, no whole model anywhere."""

from __future__ import annotations

import re

import torch
from megatron.core import parallel_state

from endprompt.checkpoint.mapping import read_parameter, row_of
from endprompt.checkpoint.weights import WeightFiles
from endprompt.models.architectures import Architecture
from endprompt.recipe import Recipe
from endprompt.training.world import World
from megatron_patches.model import unwrapped


def load_weights(chunks: list[torch.nn.Module], recipe: Recipe, architecture: Architecture, world: World) -> None:
    """Copy into every parameter the part of the Hugging Face tensors that it holds. Collective.

    Each rank reads the rows it keeps (whole matrices where tensor parallelism cuts columns), one parameter at a time, so
    host memory beyond the model is one tensor. Raises UserError on all ranks for files that are damaged on any.
    """
    world.together(lambda: _fill(chunks, WeightFiles(recipe.model.path), architecture))


@torch.no_grad()
def _fill(chunks: list[torch.nn.Module], files: WeightFiles, architecture: Architecture) -> None:
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, parameter in global_names(chunk):
            part = read_parameter(name, architecture, files.read_rows, tensor_parallel=size, rank=rank)
            if part.shape != parameter.shape:
                raise RuntimeError(f"{name}: the table gives {list(part.shape)}, Megatron holds {list(parameter.shape)}")
            parameter.copy_(part)
            mark_split(parameter, row_of(name)[0].split)


def mark_split(parameter: torch.nn.Parameter, dimension: int | None) -> None:
    """Say whether tensor-parallel ranks hold parts or copies of a parameter, as Megatron's initialisers do, which do not run here.

    Unmarked parts count as copies: the gradient norm then takes rank 0's alone and clipping scales every step wrongly.
    """
    parameter.tensor_model_parallel = dimension is not None
    parameter.partition_dim = -1 if dimension is None else dimension
    parameter.partition_stride = 1


def global_names(chunk: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of a chunk under the names that they have in the whole model: layers counted over all stages and chunks.

    With tied embeddings the last of several stages has an output layer of its own that must equal the embedding.
    """
    model = unwrapped(chunk)
    first = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    named = []
    for name, parameter in model.named_parameters():
        name = re.sub(r"(?<=^decoder\.layers\.)\d+", lambda found: str(int(found[0]) + first), name)
        if model.share_embeddings_and_output_weights and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        named.append((name, parameter))
    return named
