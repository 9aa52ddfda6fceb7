"""From a loaded model to a DeepSpeed engine."""

from __future__ import annotations

import torch

from endprompt.recipe import Recipe
from endprompt.zero3.config import deepspeed_config


def parameter_groups(recipe: Recipe, model: torch.nn.Module) -> list[dict]:
    """AdamW groups. Weight decay, where there is any, is for matrices only: norms would be pulled to zero."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not recipe.training.weight_decay:
        return [{"params": trainable, "weight_decay": 0.0}]
    # Under ZeRO-3 a parameter's own shape is empty; ds_shape is the whole tensor's.
    matrices = [p for p in trainable if len(p.ds_shape) > 1]
    vectors = [p for p in trainable if len(p.ds_shape) <= 1]
    return [{"params": matrices, "weight_decay": recipe.training.weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_engine(recipe: Recipe, model: torch.nn.Module, world_size: int, *, load_universal: bool):
    """deepspeed.initialize with torch's AdamW, which needs no compiler on the node and runs fused on CPU (offload) and GPU."""
    import deepspeed

    training = recipe.training
    optimizer = torch.optim.AdamW(
        parameter_groups(recipe, model), lr=training.learning_rate, betas=(training.beta1, training.beta2), eps=training.epsilon, fused=True
    )
    config = deepspeed_config(recipe, world_size, load_universal=load_universal)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine
