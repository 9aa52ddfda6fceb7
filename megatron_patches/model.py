"""From a recipe to this rank's part of a Megatron-Core GPTModel."""

from __future__ import annotations

import importlib.util

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from endprompt.errors import UserError
from endprompt.models.architectures import Architecture
from endprompt.models.layout import Layout
from endprompt.recipe import Recipe
from megatron_patches.modules import CausalAttention, RMSNorm


def _on_gpu() -> bool:
    """Whether parameters are made on a GPU. A dry run builds on the meta device, GPU or not."""
    return torch.cuda.is_available() and torch.get_default_device().type != "meta"


def uses_transformer_engine(recipe: Recipe) -> bool:
    """Whether layers come from Transformer Engine. Raises UserError where the recipe wants it and it is not there."""
    wanted = recipe.megatron.transformer
    there = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if wanted == "transformer_engine" and not there:
        raise UserError(
            "recipe: megatron.transformer",
            "is transformer_engine, which is not installed or finds no GPU",
            "pip install -r requirements/cluster.txt on a GPU node, or set it to local",
        )
    return there and wanted != "local"


def check_kernels(recipe: Recipe, one_layout: bool) -> None:
    """Raises UserError where the recipe asks for kernels that cannot do what its positions need."""
    engine = uses_transformer_engine(recipe)
    if not recipe.megatron.rope_fusion:
        return
    where = "recipe: megatron.rope_fusion"
    if not engine:
        raise UserError(where, "is Transformer Engine's kernel, which this run does not use", "set it to false")
    if not one_layout and recipe.training.micro_batch_size > 1:
        raise UserError(
            where,
            f"takes one table for all samples, scheme {recipe.positions.scheme} gives each sample its own",
            "set it to false, or training.micro_batch_size to 1",
        )
    if recipe.rope.type == "yarn":
        raise UserError(where, "knows no attention factor, which yarn has", "set it to false")


def transformer_config(recipe: Recipe, architecture: Architecture, layout: Layout, config: dict) -> TransformerConfig:
    """Megatron's configuration of the model and its parallel layout. config: the checkpoint's config.json."""
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    on_gpu = _on_gpu()
    recompute = {
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {"recompute_granularity": "selective"},
        "none": {},
    }[recipe.megatron_recompute]
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.get("rms_norm_eps", 1e-6),  # transformers' default
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,  # a run's numbers must not depend on its layout
        attention_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        overlap_p2p_comm=layout.virtual > 1,
        batch_p2p_comm=layout.virtual == 1,
        # A sent activation is not held until its gradient comes. Not under interleaving: its sends are still under way then, and
        # gloo would send what has been freed (seen: another loss at PP 2 x VPP 2).
        deallocate_pipeline_outputs=layout.pipeline > 1 and layout.virtual == 1,
        perform_initialization=False,  # every parameter is read from the checkpoint
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,  # no s x s scores anywhere
        apply_rope_fusion=recipe.megatron.rope_fusion,
        gradient_accumulation_fusion=False,  # needs apex's kernel
        persist_layer_norm=False,
        **recompute,
    )


def layer_spec(config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None):
    """Transformer Engine's layers, or Megatron's own with our attention and norm."""
    if transformer_engine:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec()
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return TransformerBlockSubmodules(layer_specs=[spec] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm)


def build_model(recipe: Recipe, architecture: Architecture, layout: Layout, hf_config: dict) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), their parameters not yet filled.

    In bf16 each chunk is wrapped in Float16Module, as Megatron-LM does; norms and logits follow its casts. The rotary table
    is `megatron_patches.apply(recipe)`'s, whatever the model is built with.
    """
    config = transformer_config(recipe, architecture, layout, hf_config)
    engine = _on_gpu() and uses_transformer_engine(recipe)  # a dry run: local layers have the same shapes
    chunks = []
    for stage in range(layout.virtual):
        vp_stage = stage if layout.virtual > 1 else None
        model = GPTModel(
            config=config,
            transformer_layer_spec=layer_spec(config, transformer_engine=engine, vp_stage=vp_stage),
            vocab_size=architecture.vocab_size,
            max_sequence_length=recipe.target_length,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=int(architecture.rope.theta),
            vp_stage=vp_stage,
        )
        if _on_gpu():
            model.cuda()
        chunks.append(Float16Module(config, model) if config.bf16 else model)
    return chunks


def unwrapped(chunk: torch.nn.Module) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk
