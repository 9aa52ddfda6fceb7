"""One optimizer step and one validation under ZeRO-3: weighted loss over the whole step."""

from __future__ import annotations

import torch
import torch.distributed as dist

from endprompt.data.batches import micro_batch
from endprompt.data.samples import SampleDataset
from endprompt.loss import global_weight_scale
from endprompt.training.loop import TrainingLoop
from endprompt.zero3.config import micro_steps_per_step


class Loop(TrainingLoop):
    """engine: an initialised DeepSpeed engine. For the rest see `TrainingLoop`."""

    def __init__(self, recipe, world, engine, train_data: SampleDataset, validation_data: SampleDataset | None, **callbacks):
        super().__init__(recipe, world, train_data, validation_data, **callbacks)
        self.engine = engine
        self.micro_steps = micro_steps_per_step(recipe, world.size)

    def optimizer_step(self, step: int, rate: float) -> tuple[float, float]:
        size = self.recipe.training.global_batch_size
        batches, step_weight = self.step_batches(
            lambda: [self._batch(self.train_data, step, micro, size) for micro in range(self.micro_steps)]
        )
        scale = global_weight_scale(step_weight, self.world.size, self.micro_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro, batch in enumerate(batches):
            loss = self.engine(**{name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()})
            loss_sum += loss.detach().double()
            self.engine.backward(loss * scale)
            if micro == self.micro_steps - 1:  # before the update, so that a NaN never reaches the weights
                dist.all_reduce(loss_sum)
                mean = (loss_sum / step_weight).item()
                self.check_finite(step, mean)
            self.engine.step()
        if self.engine.optimizer.overflow:  # DeepSpeed has left this update out without a word
            raise self.infinite_gradient(step)
        return mean, float(self.engine.get_global_grad_norm())

    def _batch(self, dataset: SampleDataset, step: int, micro: int, global_batch_size: int) -> dict[str, torch.Tensor]:
        training = self.recipe.training
        return micro_batch(dataset, step, micro, self.world.rank, self.world.size, training.micro_batch_size, global_batch_size)

    @torch.no_grad()
    def validate(self) -> float:
        """Every rank runs the same number of micro-batches (ZeRO-3 gathers are collective); samples beyond the count,
        which fill the last round, get weight 0."""
        self.engine.eval()
        size = self.recipe.training.micro_batch_size
        per_round = size * self.world.size
        rounds = -(-self.recipe.data.validation_samples // per_round)
        totals = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for number in range(rounds):
            first = number * per_round + self.world.rank * size
            batch = self.world.together(lambda number=number: self._batch(self.validation_data, number, 0, per_round))
            inside = torch.arange(first, first + size) < self.recipe.data.validation_samples
            batch["loss_weights"] = batch["loss_weights"] * inside[:, None]
            loss = self.engine(**{name: tensor.to(self.world.device) for name, tensor in batch.items()})
            totals += torch.stack([loss.double(), batch["loss_weights"].double().sum().to(self.world.device)])
        dist.all_reduce(totals)
        return (totals[0] / totals[1]).item()
