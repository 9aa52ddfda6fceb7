"""Two parts that stock Megatron-Core has no CPU form of (a norm for SP, attention for CP), and one rank of the tests' worlds."""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig, transformer_block
from megatron.core.transformer.module import MegatronModule
from torch.nn.functional import rms_norm, scaled_dot_product_attention


class Norm(torch.nn.Module):
    """RMSNorm whose weight says that its gradient is a part of the sequence's."""

    def __init__(self, config, hidden_size, eps=1e-5, **unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x):
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(MegatronModule):
    """Causal attention over [s, b, heads, d]; under context parallelism over the keys of all ranks, in zigzag order."""

    def __init__(self, config, *args, attention_dropout=None, pg_collection=None, **unused):
        super().__init__(config=config)
        self.group = (pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])).cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(self, query, key, value, *args, **unused):
        length, ranks, rank = query.size(0), self.group.size(), self.group.rank()
        half = length // 2

        def places(*chunks):
            return torch.cat([torch.arange(c * half, (c + 1) * half) for c in chunks])

        if ranks > 1:
            key, value = (gather_from_sequence_parallel_region(t.contiguous(), group=self.group) for t in (key, value))
            keys = places(*(c for r in range(ranks) for c in (r, 2 * ranks - 1 - r)))
            queries = places(rank, 2 * ranks - 1 - rank)
        else:
            keys = queries = torch.arange(length)
        repeats = query.size(2) // key.size(2)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=keys[None] <= queries[:, None], scale=1 / math.sqrt(q.size(-1)),
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return out.permute(2, 0, 1, 3).reshape(length, query.size(1), -1)


# One rank of the worlds of test_cpu_backend.py. The program below runs one case after the other in the same processes.

VOCAB, LENGTH, BATCH = 64, 16, 4


@dataclass
class Case:
    """One training: the layout, what is switched on, where it starts from and what it saves."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    steps: int = 3
    first: int = 0
    distributed: bool = True
    overlap: bool = False
    bf16: bool = False
    recompute: str | None = None
    dropout: float = 0.0
    sharding: str = "fully_reshardable"
    load: str | None = None
    load_optimizer: bool = True
    save: dict[int, str] = field(default_factory=dict)  # before which step, under which name


class Training:
    """Model, optimizer and data of a case.

    Virtual stages on two ranks need overlap_p2p_comm without batch_p2p_comm. In a batch, activation and gradient between the
    same two ranks are told apart by their order alone, and it differs: silently swapped, gradient norm 3700 instead of 10.
    """

    def __init__(self, case: Case):
        self.case, tp = case, case.tp
        parallel_state.initialize_model_parallel(tp, case.pp, case.vpp, context_parallel_size=case.cp)
        tensor_parallel.model_parallel_cuda_manual_seed(123)
        dtype = torch.bfloat16 if case.bf16 else torch.float32
        recompute = {
            None: {},
            "full": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
            "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
        }[case.recompute]
        self.config = TransformerConfig(
            num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=48, gated_linear_unit=True,
            activation_func=torch.nn.functional.silu, add_bias_linear=False, normalization="RMSNorm", init_method_std=0.3,
            hidden_dropout=case.dropout, attention_dropout=case.dropout, params_dtype=dtype, pipeline_dtype=dtype, bf16=case.bf16,
            tensor_model_parallel_size=tp, sequence_parallel=tp > 1, pipeline_model_parallel_size=case.pp,
            virtual_pipeline_model_parallel_size=case.vpp, context_parallel_size=case.cp, bias_activation_fusion=False,
            bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False,
            persist_layer_norm=False, overlap_p2p_comm=bool(case.vpp), batch_p2p_comm=not case.vpp, **recompute,
        )  # fmt: skip
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=case.distributed, overlap_grad_reduce=case.overlap,
            overlap_param_gather=case.overlap and case.distributed,
        )  # fmt: skip
        self.chunks = [DistributedDataParallel(self.config, ddp, self._model(i)) for i in range(case.vpp or 1)]
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-2, weight_decay=0.1, clip_grad=1.0, bf16=case.bf16, params_dtype=dtype,
                use_distributed_optimizer=case.distributed, overlap_param_gather=case.overlap and case.distributed,
            ),
            self.chunks,
        )  # fmt: skip
        self.config.finalize_model_grads_func, self.config.grad_scale_func = finalize_model_grads, self.optimizer.scale_loss
        if case.overlap:
            one = len(self.chunks) == 1
            self.config.no_sync_func = self.chunks[0].no_sync if one else [c.no_sync for c in self.chunks]
            self.config.grad_sync_func = self.chunks[0].start_grad_sync if one else [c.start_grad_sync for c in self.chunks]

    def _model(self, chunk: int) -> GPTModel:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm")
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = transformer_block.LayerNormImpl = Norm
        spec.submodules.self_attention.submodules.core_attention = Attention
        stage = dict(vp_stage=chunk if self.case.vpp else None)
        return GPTModel(
            self.config, spec, VOCAB, LENGTH, share_embeddings_and_output_weights=False, position_embedding_type="rope",
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=not self.case.vpp, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=not self.case.vpp, **stage), **stage,
        )  # fmt: skip

    def sharded(self, is_loading: bool, optimizer: bool) -> dict:
        metadata = {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
            "distrib_optim_sharding_type": self.case.sharding,
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
        }
        model = {f"model{i}": chunk.module.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(self.chunks)}
        if not optimizer:
            return model
        every = model["model0"] if len(model) == 1 else model
        return {**model, "optimizer": self.optimizer.sharded_state_dict(every, is_loading=is_loading, metadata=metadata)}

    def save(self, folder: Path) -> None:
        if torch.distributed.get_rank() == 0:
            folder.mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(self.sharded(False, self.case.distributed), str(folder))

    def load(self, folder: Path) -> None:
        state = dist_checkpointing.load(self.sharded(True, self.case.load_optimizer), str(folder))
        for i, chunk in enumerate(self.chunks):
            chunk.module.load_state_dict(state[f"model{i}"])
        if self.case.load_optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        else:
            self.optimizer.reload_model_params()

    def adam_steps(self) -> tuple[int, int, list[float]]:
        """States, distinct `step` tensors, their values."""
        inner = getattr(self.optimizer, "chained_optimizers", [self.optimizer])[0].optimizer
        steps = [state["step"] for state in inner.state.values()]
        return len(steps), len({id(step) for step in steps}), sorted({step.item() for step in steps})

    def step(self, number: int) -> tuple[float, float]:
        """Loss over the global batch (nan before the last stage) and gradient norm."""
        ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        batch = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(number))
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=self._forward, data_iterator=[iter(batch[rank::ranks]) for _ in self.chunks], model=self.chunks,
            num_microbatches=BATCH // ranks, seq_length=LENGTH, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        _, norm, _ = self.optimizer.step()
        loss = torch.tensor([sum(x["loss"].item() for x in losses) / len(losses) if losses else float("nan")])
        torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group())
        return loss.item() / ranks, float(norm)

    def _forward(self, samples, model):
        group = parallel_state.get_context_parallel_group()
        ranks, rank = group.size(), group.rank()

        def mine(tokens):
            chunks = tokens[None].chunk(2 * ranks, 1)
            return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], 1) if ranks > 1 else tokens[None]

        sample = next(samples)
        output = model(mine(sample[:-1]), mine(torch.arange(LENGTH)), None, labels=mine(sample[1:]))

        def loss_of(output):
            shown = output.detach().float().sum()
            torch.distributed.all_reduce(shown, group=group)
            return output.float().sum() / LENGTH, {"loss": shown / LENGTH}

        return output, loss_of


def run_case(case: Case, folder: Path) -> dict:
    training = Training(case)
    result = {"losses": [], "norms": []}
    if case.load:
        training.load(folder / case.load)
        if case.load_optimizer:
            result["loaded"] = training.adam_steps()
    for number in range(case.first, case.steps):
        if number in case.save:
            training.save(folder / case.save[number])
        loss, norm = training.step(number)
        result["losses"].append(loss)
        result["norms"].append(norm)
    if case.distributed:
        result["stepped"] = training.adam_steps()
    parallel_state.destroy_model_parallel()
    return result


def main() -> None:
    """Arguments PROGRAM FOLDER OUT: run the cases of the JSON file PROGRAM; the last rank writes the results to OUT."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    program, folder, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    results = {}
    for name, fields in program.items():
        fields["save"] = {int(step): target for step, target in fields.get("save", {}).items()}
        started = time.monotonic()
        results[name] = run_case(Case(**fields), folder)
        results[name]["seconds"] = time.monotonic() - started
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        out.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
