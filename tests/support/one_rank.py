"""A Megatron-Core model in this process: one rank, on a CPU, for tests of what the patches do to numbers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from endprompt.checkpoint.mapping import read_parameter
from endprompt.models.architectures import architecture_of_config
from endprompt.training.launch import _free_port
from megatron_patches import cpu_backend


@contextmanager
def one_rank_world() -> Iterator[None]:
    """gloo with a world of one, and Megatron's groups in it."""
    from megatron.core import parallel_state, tensor_parallel

    cpu_backend.install()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        cpu_backend.remove()  # the tests of other engines see torch as it is


def stock_model(*, seed: int = 0, attention=None, model_options: dict | None = None, attributes: dict | None = None, **config_options):
    """A GPTModel of upstream's own local spec: 2 layers, width 64, 4 query and 2 key/value heads, vocabulary 128, std 0.3.

    attention: core attention class in place of upstream's. model_options: of GPTModel. config_options: of TransformerConfig;
    attributes: set on it afterwards (upstream reads yarn's numbers from fields that TransformerConfig does not declare).
    """
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    options = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16,
        "normalization": "RMSNorm", "layernorm_epsilon": 1e-6, "add_bias_linear": False, "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "hidden_dropout": 0.0, "attention_dropout": 0.0, "use_cpu_initialization": True,
        "init_method_std": 0.3, "persist_layer_norm": False, "bias_activation_fusion": False, "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False, "apply_rope_fusion": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = TransformerConfig(**{**options, **config_options})
    for name, value in (attributes or {}).items():
        setattr(config, name, value)
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    return GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=128, max_sequence_length=4096, share_embeddings_and_output_weights=False,
        **{"position_embedding_type": "rope", **(model_options or {})},
    )  # fmt: skip


def huggingface_twin(model, **rope):
    """transformers' LLaMA with the weights of `stock_model(...)`; eager attention, for explicit masks. rope: config keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from endprompt.checkpoint.mapping import huggingface_names, row_of, split

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, max_position_embeddings=4096, tie_word_embeddings=False, attn_implementation="eager",
        **{"rope_theta": 10000.0, **rope},
    )  # fmt: skip
    twin = LlamaForCausalLM(config).float()
    architecture = architecture_of_config({**config.to_dict(), "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None})
    state = {}
    for name, parameter in model.named_parameters():
        row, layer = row_of(name)
        parts = split(parameter.detach().clone(), row.layout, architecture)
        state.update(zip(huggingface_names(row, layer), parts, strict=True))
    twin.load_state_dict(state)
    back = {name: read_parameter(name, architecture, lambda hf, a, b: state[hf][a:b]) for name, _ in model.named_parameters()}
    assert all(torch.equal(back[name], parameter) for name, parameter in model.named_parameters()), "split and join are inverse"
    return twin
