"""One optimizer step and one validation through Megatron-Core's pipeline schedules: weighted loss over the whole step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from endprompt.data.batches import micro_batch
from endprompt.data.samples import SampleDataset
from endprompt.loss import global_weight_scale
from endprompt.training.loop import TrainingLoop
from megatron_patches import rotary
from megatron_patches.batches import get_batch
from megatron_patches.engine import Engine


class Loop(TrainingLoop):
    """engine: see `build_engine`. For the rest see `TrainingLoop`."""

    def __init__(self, recipe, world, engine: Engine, train_data: SampleDataset, validation_data: SampleDataset | None, **callbacks):
        super().__init__(recipe, world, train_data, validation_data, **callbacks)
        self.engine, self.layout = engine, engine.layout
        self.replicas = self.layout.world_size // self.layout.data  # ranks that work on the same samples

    def optimizer_step(self, step: int, rate: float) -> tuple[float, float]:
        size, layout = self.recipe.training.global_batch_size, self.layout
        batches, weight = self.step_batches(lambda: [self._batch(self.train_data, step, m, size) for m in range(layout.micro_steps)])
        step_weight = weight / self.replicas
        # Megatron's schedule multiplies the loss by CP / micro-steps, its DDP averages over DP x CP: the same share as DeepSpeed's.
        scale = global_weight_scale(step_weight, layout.data, layout.micro_steps)
        self.engine.scheduler.go_to(step)
        self.engine.train(True)
        self.engine.zero_grad()
        mean = self._run(batches, scale) / step_weight.item()
        self.check_finite(step, mean)  # before the update, so that a NaN never reaches the weights
        _, gradient_norm, _ = self.engine.optimizer.step()
        gradient_norm = float(gradient_norm) if gradient_norm is not None else self._gradient_norm()
        if not torch.isfinite(torch.tensor(gradient_norm)):
            raise self.infinite_gradient(step)
        return mean, gradient_norm

    def _gradient_norm(self) -> float:
        """With clipping off Megatron computes no norm by itself."""
        return float(self.engine.optimizer.get_grad_norm())

    @torch.no_grad()
    def validate(self) -> float:
        """Every data-parallel rank runs the same number of rounds of as many micro-batches as a pipeline wants; samples
        beyond the count, which fill the last round, get weight 0."""
        self.engine.sync_parameters()
        self.engine.train(False)
        layout, size = self.layout, self.recipe.training.micro_batch_size
        micro_steps = layout.pipeline  # few bubbles, and what an interleaved schedule asks for
        per_round = size * layout.data * micro_steps
        loss = total = 0.0
        for number in range(-(-self.recipe.data.validation_samples // per_round)):
            batches, weight = self.step_batches(
                lambda number=number: [self._validation_batch(number, micro, per_round) for micro in range(micro_steps)]
            )
            loss += self._run(batches, torch.ones(()), forward_only=True)
            total += weight.item() / self.replicas
        return loss / total

    def loss_of(self, tokens: np.ndarray, position_ids: np.ndarray, labels: np.ndarray, loss_weights: np.ndarray) -> float:
        """Weighted loss sum of one sample, [n] each, without gradients. Collective, and the same on every rank."""
        row = {"input_ids": tokens, "position_ids": position_ids, "labels": labels, "loss_weights": loss_weights}
        size = self.recipe.training.micro_batch_size
        batch = {key: torch.from_numpy(value)[None].repeat(size, 1) for key, value in row.items()}
        return self._run([batch] * self.layout.pipeline, torch.ones(()), forward_only=True)

    def _batch(self, dataset: SampleDataset, step: int, micro: int, global_batch_size: int) -> dict[str, torch.Tensor]:
        rank, size = parallel_state.get_data_parallel_rank(), self.recipe.training.micro_batch_size
        return micro_batch(dataset, step, micro, rank, self.layout.data, size, global_batch_size)

    def _validation_batch(self, number: int, micro: int, per_round: int) -> dict[str, torch.Tensor]:
        batch, size = self._batch(self.validation_data, number, micro, per_round), self.recipe.training.micro_batch_size
        first = number * per_round + (micro * self.layout.data + parallel_state.get_data_parallel_rank()) * size
        inside = torch.arange(first, first + size) < self.recipe.data.validation_samples
        return {**batch, "loss_weights": batch["loss_weights"] * inside[:, None]}

    def _run(self, batches: list[dict[str, torch.Tensor]], scale: torch.Tensor, *, forward_only: bool = False) -> float:
        """The schedule over this rank's micro-batches. Returns the sum of weight * loss over the whole step, on every rank."""
        scale = scale.to(self.world.device)

        def weighted(losses: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = (losses.float() * weights).sum()
            return total * scale, total.detach().double()

        def forward_step(iterator: Iterator[dict], chunk: torch.nn.Module):
            tokens, labels, weights, mask, positions = get_batch(iterator)
            losses = chunk(tokens, positions, mask, labels=labels)  # [b, s / CP] on the last stage
            return losses, lambda output: weighted(output, weights)

        chunks = self.engine.chunks
        for batch in batches:
            check_one_layout(batch["position_ids"])
        keyed = [megatron_keys(batch) for batch in batches]
        iterators = [iter(keyed) for _ in chunks]  # one a chunk: each asks for every micro-batch
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            seq_length=self.recipe.positions.physical_length,
            micro_batch_size=self.recipe.training.micro_batch_size,
            forward_only=forward_only,
        )
        # The last stage reports; its tensor-parallel ranks all report the same, so their sum is divided by TP.
        total = torch.stack(reported).sum() if reported else torch.zeros((), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(total)
        return total.item() / self.layout.tensor


def megatron_keys(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`micro_batch`'s names to Megatron's."""
    return {
        "tokens": batch["input_ids"],
        "labels": batch["labels"],
        "loss_mask": batch["loss_weights"],
        "position_ids": batch["position_ids"],
    }


def check_one_layout(position_ids: torch.Tensor) -> None:
    """Under one rotary table for all, samples with other positions would be turned wrongly without any other sign."""
    if rotary.state.one_layout and not torch.equal(position_ids, position_ids[:1].expand_as(position_ids)):
        raise RuntimeError("samples of one micro-batch have different positions, but the recipe's scheme promised one layout")
