"""What ZeRO-3 needs beyond `endprompt.training.prepare`: the DeepSpeed settings, the batch split, a config transformers reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.errors import UserError
from endprompt.models.hf_config import load_hf_config
from endprompt.recipe import Recipe
from endprompt.training import prepare as shared
from endprompt.training.prepare import Inputs, read_inputs
from endprompt.training.run_folder import RunFolder
from endprompt.zero3.config import micro_steps_per_step, offload_device, read_situation
from endprompt.zero3.load import model_config


@dataclass(frozen=True)
class Prepared(Inputs):
    situation: dict  # DeepSpeed settings file
    micro_steps: int


def prepare(recipe: Recipe, world_size: int) -> Prepared:
    """Check everything that can be checked before a weight is read. Seconds for any model. Raises UserError."""
    situation = read_situation(recipe)
    micro_steps = micro_steps_per_step(recipe, world_size)
    check_transformers_reads(load_hf_config(recipe.model.path), recipe.model.path)  # first: its tokenizer loader words it badly
    inputs = read_inputs(recipe)
    return Prepared(**vars(inputs), situation=situation, micro_steps=micro_steps)


def check_transformers_reads(config: dict[str, Any], directory: str) -> None:
    """Raises UserError where transformers finds something in config.json that our own reading has passed."""
    try:
        model_config(config)
    except Exception as error:  # huggingface_hub's field validation has exceptions of its own
        detail = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise UserError(Path(directory) / "config.json", f"transformers cannot read it ({detail})", "download the file again") from None


def describe(recipe: Recipe, prepared: Prepared, folder: RunFolder, world_size: int) -> str:
    """The dry run's table."""
    training = recipe.training
    batch = f"{training.global_batch_size} samples = {training.micro_batch_size} x {prepared.micro_steps} micro-steps x {world_size} ranks"
    states = describe_states(prepared.architecture.parameters, world_size, prepared.situation)
    return shared.describe(recipe, prepared, folder, [("batch", batch), ("states", states)])


def describe_states(parameters: int, world_size: int, situation: dict) -> str:
    """Where the states lie, per rank in 10^9 bytes (deepspeed_configs/README.md has the arithmetic per parameter)."""
    share = parameters / world_size / 1e9
    if offload_device(situation, "offload_param") != "none":
        return f"{22 * share:.1f} GB a rank on the host, gathered layers on the device"
    if offload_device(situation, "offload_optimizer") != "none":
        return f"{2 * share:.1f} GB a rank on the device, {20 * share:.1f} GB on the host"
    return f"{18 * share:.1f} GB a rank on the device"
