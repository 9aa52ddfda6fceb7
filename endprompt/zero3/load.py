"""Build a model under ZeRO-3 and fill it from safetensors, each rank reading only the part it keeps.

No collective and no whole model anywhere: peak host memory of a rank is its own partition plus the rows of one tensor's
slice. transformers' own ZeRO-3 loading merges the whole checkpoint on rank 0 first.
"""

from __future__ import annotations

from typing import Any

import torch

from endprompt.checkpoint.weights import WeightFiles
from endprompt.models.hf_config import extended_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies
from endprompt.training.world import World
from endprompt.zero3.attention import choose_attention
from endprompt.zero3.config import deepspeed_config
from endprompt.zero3.host_memory import tensors_returned_to_the_system
from endprompt.zero3.model import CausalLMForWeightedLoss


def model_config(config: dict[str, Any], **changes):
    """transformers' configuration object of a config.json."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{**config, **changes})


def load_model(recipe: Recipe, config: dict[str, Any], rope: RopeScaling, world: World) -> CausalLMForWeightedLoss:
    """The recipe's model, ZeRO-3-partitioned, with the extended rotary table, weights read, activation checkpointing set.

    config: the checkpoint's config.json. Raises UserError for damaged files and RopeMismatch if transformers' rotary table
    is not ours.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers import initialization as init
    from transformers.integrations.deepspeed import prevent_arange_dtype_change
    from transformers.modeling_utils import local_torch_dtype

    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    extended = model_config(extended_config(config, rope, recipe.target_length), use_cache=False)
    extended._attn_implementation = choose_attention(world.device, recipe.training.precision)
    # prevent_arange_dtype_change comes first: zero.Init would make the rotary table bf16, whose cos is off by up to 2 at 131071.
    with (
        tensors_returned_to_the_system(),
        init.no_init_weights(),
        local_torch_dtype(dtype),
        prevent_arange_dtype_change(),
        deepspeed.zero.Init(config_dict_or_path=deepspeed_config(recipe, world.size)),
    ):
        model = AutoModelForCausalLM.from_config(extended, dtype=dtype)
    model.tie_weights()
    world.together(lambda: _fill(model, WeightFiles(recipe.model.path)))
    _check_rope(model, rope)
    if recipe.training.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return CausalLMForWeightedLoss(model)


@torch.no_grad()
def _fill(model: torch.nn.Module, files: WeightFiles) -> None:
    """Copy this rank's flat slice of every parameter. ds_tensor is the partition: elements [rank * n, (rank + 1) * n), padded."""
    for name, parameter in model.named_parameters():  # tied parameters appear once, under the first name
        partition = parameter.ds_tensor
        start = torch.distributed.get_rank(group=parameter.ds_process_group) * partition.ds_numel
        stop = min(start + partition.ds_numel, parameter.ds_numel)
        if stop > start:
            partition.narrow(0, 0, stop - start).copy_(files.read_flat(name, start, stop))


class RopeMismatch(RuntimeError):
    """transformers built another rotary table than endprompt/rope.py: this version reads config.json differently."""


def _check_rope(model: torch.nn.Module, rope: RopeScaling) -> None:
    """The model's table is fp32 and equals a fresh one; a bf16 table would be wrong without any other sign."""
    rotary = model.get_decoder().rotary_emb
    expected = inverse_frequencies(rope)
    found = rotary.inv_freq
    if found.dtype != torch.float32 or not torch.allclose(found.cpu(), expected, rtol=1e-5, atol=0):
        raise RopeMismatch(
            f"rotary table is {found.dtype}, largest relative error {((found.cpu().float() - expected) / expected).abs().max():.1e}"
        )
    if abs(rotary.attention_scaling - attention_factor(rope)) > 1e-5:
        raise RopeMismatch(f"attention factor is {rotary.attention_scaling}, expected {attention_factor(rope)}")
