"""FLOPs of a plan against torch's counter on transformers' own model, like for like."""

from __future__ import annotations

import pytest
import torch

from endprompt.models.architectures import architecture_of_config
from endprompt.planning import Cluster, make_plan
from tests.support.recipes import make_recipe

SHAPES = {
    "grouped queries": {"num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "all heads, tied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("length", [64, 256])
def test_flops_of_a_plan_are_the_counters(tmp_path, shape, length):
    """The counter takes the full square of attention; a plan, like the kernels, its causal half of (n + 1) / 2 columns."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=352, num_hidden_layers=3, max_position_embeddings=64,
        rope_theta=10000.0, **SHAPES[shape],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    config._attn_implementation = "eager"  # plain products, which the counter sees; it knows no fused CPU kernel
    model, ids = LlamaForCausalLM(config), torch.randint(512, (2, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    recipe = make_recipe(
        **{"model.path": str(tmp_path), "model.original_length": 64, "positions.physical_length": length, "target_length": 1024}
    )
    plan = make_plan(recipe, "deepspeed", Cluster(1, 2))
    architecture = architecture_of_config(config.to_dict() | {"rope_theta": 10000.0})
    causal = plan.flops_per_token - 6 * architecture.matmul_parameters
    full_square = causal * 2 * length / (length + 1)
    measured = counter.get_total_flops() / ids.numel()
    assert 6 * architecture.matmul_parameters + full_square == pytest.approx(measured, rel=0.01)
    assert full_square > 0.03 * measured  # the attention term is large enough to be seen by a bar of 1 %
