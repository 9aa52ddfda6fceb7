"""Process groups, DistributedDataParallel, optimizer and parameter scheduler: Megatron-Core's own, set up from a recipe."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from endprompt.models.layout import Layout
from endprompt.recipe import Recipe
from endprompt.training.schedule import learning_rate
from endprompt.training.world import World
from megatron_patches import cpu_backend, torch_adam

TIMEOUT = timedelta(hours=2)
"""Of every collective: long enough for a slow disk to take a checkpoint while other ranks wait (torch's default: 10 minutes)."""


def init_distributed() -> World:
    """Join the process group that the launcher's environment describes; NCCL on GPUs, gloo on CPUs with the CPU backend."""
    # Orders the messages of tensor parallelism before the products that hide them; read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    warnings.filterwarnings("ignore", message="(?s).*(Transformer Engine|Apex|apex|deprecated|grad attribute of a Tensor).*")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    cpu_backend.install()
    torch_adam.install()
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    return World.current()


def init_parallel(layout: Layout, *, gloo_groups: bool = True) -> None:
    """Megatron's process groups of the layout. Seeds matter to nothing (weights are read, dropout is 0) but must be set.

    gloo_groups: groups on the host besides NCCL's, over which optimizer states go into checkpoints.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual if layout.virtual > 1 else None,
        context_parallel_size=layout.context,
        create_gloo_process_groups=gloo_groups,
        distributed_timeout_minutes=TIMEOUT // timedelta(minutes=1),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


@dataclass
class Engine:
    """chunks: DistributedDataParallel model chunks of this rank. optimizer: Megatron's. scheduler: its lr, from the recipe."""

    chunks: list
    optimizer: object
    scheduler: object
    layout: Layout
    overlap: bool

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def train(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    def sync_parameters(self) -> None:
        """Gather what an overlapped step leaves to the next forward pass: before validation and before a checkpoint."""
        if self.overlap:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)


def build_engine(recipe: Recipe, layout: Layout, chunks: list[torch.nn.Module]) -> Engine:
    """Wrap the filled chunks for training.

    Gradients are reduced and accumulated in fp32. Learning rate and weight decay are the scheduler's; decay is for matrices
    only (Megatron's default, and ds_train's).
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    training, config = recipe.training, chunks[0].config
    distributed = recipe.megatron.distributed_optimizer
    overlap = recipe.megatron.overlap and distributed and layout.data * layout.context > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=distributed, overlap_grad_reduce=overlap, overlap_param_gather=overlap
    )
    wrapped = [DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.learning_rate,
            min_lr=training.min_learning_rate,
            weight_decay=training.weight_decay,
            adam_beta1=training.beta1,
            adam_beta2=training.beta2,
            adam_eps=training.epsilon,
            clip_grad=training.clip_grad,
            bf16=training.precision == "bf16",
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
            overlap_param_gather=overlap,
        ),
        wrapped,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if overlap:
        functions = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = functions if len(wrapped) > 1 else functions[0]
    return Engine(wrapped, optimizer, recipe_scheduler(recipe, optimizer), layout, overlap)


def recipe_scheduler(recipe: Recipe, optimizer):
    """Megatron-Core's OptimizerParamScheduler whose learning rate is `endprompt.training.schedule`'s, as on DeepSpeed.

    Upstream's own curve differs by one step (its first update already has 1 / warmup_steps of the rate).
    """
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    class RecipeScheduler(OptimizerParamScheduler):
        def get_lr(self, param_group: dict) -> float:
            return learning_rate(recipe, self.num_steps) * param_group.get("lr_mult", 1.0)

        def go_to(self, step: int) -> None:
            """Rates of optimizer step `step`, counted from 0."""
            self.step(step - self.num_steps)

    training = recipe.training
    return RecipeScheduler(
        optimizer, init_lr=0.0, max_lr=training.learning_rate, min_lr=training.min_learning_rate, lr_warmup_steps=0,
        lr_decay_steps=max(1, recipe.steps), lr_decay_style="constant", start_wd=training.weight_decay, end_wd=training.weight_decay,
        wd_incr_steps=max(1, recipe.steps), wd_incr_style="constant",
    )  # fmt: skip
