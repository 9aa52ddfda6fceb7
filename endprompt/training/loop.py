"""The loop that every engine shares: steps, validation, checkpoints, stopping. An engine adds one step and one validation."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.distributed as dist

from endprompt.data.samples import SampleDataset
from endprompt.errors import UserError
from endprompt.recipe import Recipe
from endprompt.training.monitor import Monitor
from endprompt.training.schedule import learning_rate
from endprompt.training.world import World

NOT_FINITE = (
    "lower training.learning_rate or look at the data of this step, then go on from a checkpoint before it (checkpoints/latest names it)"
)


class TrainingLoop(ABC):
    """train_data, validation_data: SampleDataset (validation None when the recipe has none). monitor: the logging rank's, else None.

    save(step): collective. stop_reason(): looked at once a step on every rank.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        train_data: SampleDataset,
        validation_data: SampleDataset | None,
        *,
        save: Callable[[int], None],
        stop_reason: Callable[[], str | None],
        monitor: Monitor | None,
    ):
        self.recipe, self.world = recipe, world
        self.train_data, self.validation_data = train_data, validation_data
        self.save, self.stop_reason, self.monitor = save, stop_reason, monitor

    @abstractmethod
    def optimizer_step(self, step: int, rate: float) -> tuple[float, float]:
        """One step over the global batch at learning rate `rate`. Returns (weighted mean loss, gradient norm before clipping).

        Collective; both numbers are valid on the monitor's rank at least. Raises UserError on every rank when they are not
        finite (`check_finite`): a loss before the weights change, a gradient at the latest before anything is saved.
        """

    @abstractmethod
    def validate(self) -> float:
        """Weighted mean loss over the first validation_samples samples of the validation data. Collective."""

    def run(self, start_step: int) -> str | None:
        """Steps start_step ... recipe.steps - 1. Returns who asked to stop, None when the run is finished."""
        output = self.recipe.output
        for step in range(start_step, self.recipe.steps):
            if self.monitor:
                self.monitor.start_step()
            rate = learning_rate(self.recipe, step)
            loss, gradient_norm = self.optimizer_step(step, rate)
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

    @staticmethod
    def check_finite(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(f"step {step + 1}", f"the loss is {loss}", NOT_FINITE)

    @staticmethod
    def infinite_gradient(step: int) -> UserError:
        return UserError(f"step {step + 1}", "a gradient is infinite or NaN", NOT_FINITE)

    def step_batches(self, read: Callable[[], list[dict[str, torch.Tensor]]]) -> tuple[list[dict[str, torch.Tensor]], torch.Tensor]:
        """`read()`: this rank's micro-batches of a step, and the fp64 sum of their weights over all ranks. Collective.

        Bad data, a token out of range for instance, is met by one rank alone. It passes that on as a NaN weight, so that
        all ranks raise its UserError together and a good step costs no collective more.
        """
        batches, error, weight = [], None, torch.tensor(float("nan"), dtype=torch.float64)
        try:
            batches = read()
            weight = torch.stack([batch["loss_weights"].double().sum() for batch in batches]).sum()
        except UserError as problem:
            error = problem
        weight = weight.to(self.world.device)
        dist.all_reduce(weight)
        if weight.isnan():
            self.world.together(lambda: _raise(error))
        return batches, weight

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
