"""Real GPTModels over gloo, one world of four processes for many jobs: load a checkpoint at a layout, run it, save it again.

    megatron_world.py JOBS        one rank of four, by the environment of endprompt's launcher or of torchrun

A job: {"checkpoint", "config" (config.json of the same model), "tensor", "pipeline", "tokens" (.pt), "logits" (.pt to write),
"save" (folder to write, or null), "metadata" (Megatron's sharded_state_dict metadata)}. What is left of the four ranks is data parallel.
Logits are computed in fp32. When it saves, the model has the checkpoint's dtype and has made one training step of learning
rate 0 before.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_patches import cpu_backend  # noqa: E402


def build(job: dict, config: dict, first: bool, last: bool):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[config["dtype"] if job["save"] else "float32"]
    transformer = TransformerConfig(
        num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"], ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"], num_query_groups=config["num_key_value_heads"],
        kv_channels=config.get("head_dim"), layernorm_epsilon=config["rms_norm_eps"], normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=job["tensor"], pipeline_model_parallel_size=job["pipeline"],
        pipeline_dtype=dtype, params_dtype=dtype, bf16=dtype == torch.bfloat16, bias_activation_fusion=False,
        masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False, persist_layer_norm=False,
    )  # fmt: skip
    rope = config["rope_parameters"]
    return GPTModel(
        transformer, get_gpt_layer_local_spec(normalization="RMSNorm"), vocab_size=config["vocab_size"],
        max_sequence_length=config["max_position_embeddings"], pre_process=first, post_process=last, position_embedding_type="rope",
        share_embeddings_and_output_weights=config["tie_word_embeddings"], rotary_base=rope["rope_theta"],
        rope_scaling=rope["rope_type"] == "llama3", rope_scaling_factor=rope.get("factor", 8.0),
    )  # fmt: skip


def run(job: dict) -> None:
    from megatron.core import dist_checkpointing, tensor_parallel
    from megatron.core import parallel_state as ps

    # The whole world shares out what it has: data parallel ranks repeat the model.
    ps.initialize_model_parallel(job["tensor"], job["pipeline"])
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    torch.manual_seed(dist.get_rank())  # nothing but the checkpoint makes the ranks agree
    config = json.loads(Path(job["config"]).read_text())
    model = build(job, config, ps.is_pipeline_first_stage(), ps.is_pipeline_last_stage())
    metadata = {**job["metadata"], "dp_cp_group": ps.get_data_parallel_group(with_context_parallel=True)}
    loaded = dist_checkpointing.load(model.sharded_state_dict(metadata=metadata), job["checkpoint"])
    model.load_state_dict(loaded)
    if job["logits"]:
        logits = forward(model, torch.load(job["tokens"]), ps, job, train=False)
        if ps.is_pipeline_last_stage() and ps.get_data_parallel_rank() == 0 and ps.get_tensor_model_parallel_rank() == 0:
            torch.save(logits, job["logits"])
    if job["save"]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.1)
        forward(model, torch.load(job["tokens"]), ps, job, train=True)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimizer.step()
        if dist.get_rank() == 0:
            os.makedirs(job["save"], exist_ok=True)
        dist.barrier()
        dist_checkpointing.save(model.sharded_state_dict(metadata={**metadata, **job.get("save_metadata", {})}), job["save"])
    dist.barrier()
    ps.destroy_model_parallel()


def forward(model, tokens: torch.Tensor, ps, job: dict, train: bool):
    """Logits [batch, length, vocabulary] fp32 on the last stage; with `train` gradients instead."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    length = tokens.shape[1]
    causal = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    positions = torch.arange(length)[None].repeat(tokens.shape[0], 1)
    outputs = []

    def step(iterator, module):
        next(iterator)
        out = module(tokens, positions, causal, labels=tokens if train else None)

        def loss(value):
            if train:
                return value.float().mean(), {}
            parts = [torch.empty_like(value) for _ in range(job["tensor"])]
            dist.all_gather(parts, value.contiguous(), group=ps.get_tensor_model_parallel_group())
            outputs.append(torch.cat(parts, -1).float())
            return value.float().mean(), {}

        return out, loss

    with torch.set_grad_enabled(train):
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=iter([0]), model=[model] if job["pipeline"] > 1 else model, num_microbatches=1,
            seq_length=length, micro_batch_size=tokens.shape[0], decoder_seq_length=length, forward_only=not train,
        )  # fmt: skip
    return outputs[0] if outputs else None


def main() -> None:
    torch.set_num_threads(1)
    cpu_backend.install()
    dist.init_process_group("gloo")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        began = time.monotonic()
        run(job)
        if dist.get_rank() == 0:
            print(f"{time.monotonic() - began:.2f} s", {key: job[key] for key in ("tensor", "pipeline", "save")}, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
