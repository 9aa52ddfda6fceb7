"""The training loop under ZeRO-3: weighted loss over the whole step, validation, checkpoints, stopping."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from endprompt.data.batches import micro_batch
from endprompt.data.samples import SampleDataset
from endprompt.errors import UserError
from endprompt.loss import global_weight_scale
from endprompt.recipe import Recipe
from endprompt.training.monitor import Monitor
from endprompt.training.schedule import learning_rate
from endprompt.training.world import World
from endprompt.zero3.config import micro_steps_per_step

NOT_FINITE = (
    "lower training.learning_rate or look at the data of this step, then go on from a checkpoint before it "
    "(checkpoints/latest names it)"
)


class Loop:
    """Runs optimizer steps on an initialised engine.

    train_data, validation_data: SampleDataset (validation None when the recipe has none). monitor: rank 0's, else None.
    save(step): collective. stop_reason(): looked at once a step on every rank.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        engine,
        train_data: SampleDataset,
        validation_data: SampleDataset | None,
        *,
        save: Callable[[int], None],
        stop_reason: Callable[[], str | None],
        monitor: Monitor | None,
    ):
        self.recipe, self.world, self.engine = recipe, world, engine
        self.train_data, self.validation_data = train_data, validation_data
        self.save, self.stop_reason, self.monitor = save, stop_reason, monitor
        self.micro_steps = micro_steps_per_step(recipe, world.size)

    def run(self, start_step: int) -> str | None:
        """Steps start_step ... recipe.steps - 1. Returns who asked to stop, None when the run is finished."""
        output = self.recipe.output
        for step in range(start_step, self.recipe.steps):
            if self.monitor:
                self.monitor.start_step()
            rate = learning_rate(self.recipe, step)
            loss, gradient_norm = self._optimizer_step(step, rate)
            done, last = step + 1, step + 1 == self.recipe.steps
            if self.monitor:
                self.monitor.end_step(done, loss, rate, gradient_norm)
            if self.validation_data and (last or done % output.validation_interval == 0):
                validation = self.validate()
                if self.monitor:
                    self.monitor.validation(done, validation)
            stopped_by = None if last else self._agreed_stop()
            if last or stopped_by or done % output.save_interval == 0:
                self.save(done)
            if stopped_by:
                return stopped_by
        return None

    def _optimizer_step(self, step: int, rate: float) -> tuple[float, float]:
        """One step over the global batch. Returns (weighted mean loss, gradient norm before clipping)."""
        batches, step_weight = self._step_batches(step)
        scale = global_weight_scale(step_weight, self.world.size, self.micro_steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        self.engine.train()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for micro, batch in enumerate(batches):
            loss = self.engine(**{name: tensor.to(self.world.device, non_blocking=True) for name, tensor in batch.items()})
            loss_sum += loss.detach().double()
            self.engine.backward(loss * scale)
            if micro == self.micro_steps - 1:
                mean = self._finite_mean(loss_sum, step_weight, step)  # before the update, so that a NaN never reaches the weights
            self.engine.step()
        if self.engine.optimizer.overflow:  # DeepSpeed has left this update out without a word
            raise UserError(
                f"step {step + 1}",
                "a gradient is infinite or NaN",
                NOT_FINITE,
            )
        return mean, float(self.engine.get_global_grad_norm())

    def _finite_mean(self, loss_sum: torch.Tensor, step_weight: torch.Tensor, step: int) -> float:
        dist.all_reduce(loss_sum)
        mean = (loss_sum / step_weight).item()
        if mean != mean or mean in (float("inf"), float("-inf")):
            raise UserError(
                f"step {step + 1}",
                f"the loss is {mean}",
                NOT_FINITE,
            )
        return mean

    def _step_batches(self, step: int) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """This rank's micro-batches and the fp64 sum of weights over all ranks.

        Bad data, a token out of range for instance, is met by one rank alone. It passes that on as a NaN weight, so that
        all ranks raise its UserError together and a good step costs no collective more.
        """
        size = self.recipe.training.global_batch_size
        batches, error, weight = [], None, torch.tensor(float("nan"), dtype=torch.float64)
        try:
            batches = [self._batch(self.train_data, step, micro, size) for micro in range(self.micro_steps)]
            weight = torch.stack([batch["loss_weights"].double().sum() for batch in batches]).sum()
        except UserError as problem:
            error = problem
        weight = weight.to(self.world.device)
        dist.all_reduce(weight)
        if weight.isnan():
            self.world.together(lambda: _raise(error))
        return batches, weight

    def _batch(self, dataset: SampleDataset, step: int, micro: int, global_batch_size: int) -> dict[str, torch.Tensor]:
        training = self.recipe.training
        return micro_batch(dataset, step, micro, self.world.rank, self.world.size, training.micro_batch_size, global_batch_size)

    @torch.no_grad()
    def validate(self) -> float:
        """Weighted mean loss over the first validation_samples samples of the validation data. Collective.

        Every rank runs the same number of micro-batches (ZeRO-3 gathers are collective); samples beyond the count,
        which fill the last round, get weight 0.
        """
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

    def _agreed_stop(self) -> str | None:
        """The reason to stop that any rank has seen, agreed by all: a signal may reach one node a step before another."""
        mine = self.stop_reason()
        seen = torch.tensor([mine is not None and mine != "STOP file", mine == "STOP file"], dtype=torch.int32, device=self.world.device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        by_signal, by_file = (bool(flag) for flag in seen.tolist())
        if by_file:
            return "STOP file"
        return (mine or "a signal on another rank") if by_signal else None


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
