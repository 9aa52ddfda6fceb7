"""The DeepSpeed configuration of a run: the situation's JSON plus everything that the recipe decides."""

from __future__ import annotations

import json
from pathlib import Path

from endprompt.errors import UserError
from endprompt.recipe import Recipe

RECIPE_HOLDS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "training.clip_grad",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "optimizer": "training.learning_rate and its neighbours",
    "scheduler": "training.schedule",
    "wandb": "wandb",
    "activation_checkpointing": "training.activation_checkpointing",
}


def micro_steps_per_step(recipe: Recipe, data_parallel: int) -> int:
    """Micro-batches each rank runs before an optimizer step. Raises UserError where the batch does not divide."""
    per_micro_step = recipe.training.micro_batch_size * data_parallel
    if recipe.training.global_batch_size % per_micro_step:
        raise UserError(
            "recipe: training.global_batch_size",
            f"{recipe.training.global_batch_size} does not divide by micro_batch_size {recipe.training.micro_batch_size} "
            f"x {data_parallel} ranks = {per_micro_step}",
            "change the number of ranks, micro_batch_size or global_batch_size",
        )
    return recipe.training.global_batch_size // per_micro_step


def read_situation(recipe: Recipe) -> dict:
    """The ZeRO settings file that the recipe names, checked. Raises UserError."""
    path = Path(recipe.deepspeed.config)
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(path, "no such DeepSpeed configuration", "set deepspeed.config to a file of deepspeed_configs/") from None
    except ValueError as error:
        raise UserError(path, f"is not valid JSON ({error})", "correct the syntax") from None
    if not isinstance(config, dict):
        raise UserError(path, "holds no JSON object", "start from deepspeed_configs/zero3.json")
    for key in config:
        if key in RECIPE_HOLDS:
            raise UserError(f"{path}: {key}", f"belongs to the recipe ({RECIPE_HOLDS[key]})", "remove it here and set it there")
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        raise UserError(
            f"{path}: zero_optimization.stage", "is not 3", "this trainer loads, saves and exports ZeRO-3 partitions; set it to 3"
        )
    for part in ("offload_param", "offload_optimizer"):
        if not isinstance(zero.get(part) or {}, dict):
            raise UserError(f"{path}: {part}", "is not an object", 'write {"device": "cpu"}')
    for part in ("offload_param", "offload_optimizer"):
        if (device := offload_device(config, part)) not in ("none", "cpu"):
            raise UserError(f"{path}: {part}.device", f"is {device}, which is not supported", "set it to cpu or none")
    if zero.get("zero_hpz_partition_size", 1) != 1:
        raise UserError(f"{path}: zero_hpz_partition_size", "is not 1; weights are read into the first partition only", "remove it")
    return config


def offload_device(situation: dict, part: str) -> str:
    """Where `offload_param` or `offload_optimizer` puts things: cpu or none."""
    return (situation["zero_optimization"].get(part) or {}).get("device") or "none"


def deepspeed_config(recipe: Recipe, data_parallel: int, *, load_universal: bool = False) -> dict:
    """What deepspeed.initialize and zero.Init get."""
    config = read_situation(recipe)
    config.update(
        train_batch_size=recipe.training.global_batch_size,
        train_micro_batch_size_per_gpu=recipe.training.micro_batch_size,
        gradient_accumulation_steps=micro_steps_per_step(recipe, data_parallel),
        gradient_clipping=recipe.training.clip_grad,
        bf16={"enabled": recipe.training.precision == "bf16"},
        steps_per_print=2**31,  # the progress line is ours
    )
    if load_universal:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config
