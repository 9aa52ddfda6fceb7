"""What a run tells people while it goes: a progress line, log.jsonl, and Weights & Biases when asked."""

from __future__ import annotations

import math
import time
from datetime import timedelta

import torch

from endprompt.errors import UserError
from endprompt.models.architectures import training_flops_per_token
from endprompt.recipe import Recipe
from endprompt.training.hardware import peak_flops, peak_memory_gb
from endprompt.training.run_folder import RunFolder


def import_wandb(recipe: Recipe):
    """The wandb module when the recipe wants it, else None. Raises UserError when it is wanted and absent."""
    if recipe.wandb.mode == "disabled":
        return None
    try:
        import wandb
    except ImportError:
        raise UserError(
            "recipe: wandb.mode", f"is {recipe.wandb.mode} but wandb is not installed", "pip install wandb, or set it to disabled"
        ) from None
    return wandb


class Monitor:
    """Lives on rank 0.

    MFU is achieved over peak FLOP/s: tokens/s x FLOPs per token / (GPUs x dense bf16 peak). FLOPs per token is
    `training_flops_per_token`: 6 per matmul parameter plus causal attention at the physical length, without recomputation.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, architecture, device: torch.device, world_size: int, start_step: int):
        self._recipe, self._folder, self._device = recipe, folder, device
        self._flops_per_token = training_flops_per_token(architecture, recipe.positions.physical_length)
        peak = peak_flops(device)
        self._peak = peak * world_size if peak else None
        self._started, self._start_step, self._step_started = time.monotonic(), start_step, time.monotonic()
        wandb = import_wandb(recipe)
        self._wandb = self._open_wandb(wandb, recipe.wandb.mode, start_step) if wandb is not None else None

    def _open_wandb(self, wandb, mode: str, start_step: int):
        """Start or go on with the run's one wandb run. A run that trains already is not stopped by a server that is away."""
        recipe, folder = self._recipe, self._folder
        try:
            return wandb.init(
                project=recipe.wandb.project, entity=recipe.wandb.entity, name=recipe.name, id=folder.wandb_id(), resume="allow",
                mode=mode, dir=str(folder.path), config=recipe.model_dump(mode="json"),
            )  # fmt: skip
        except wandb.Error as error:
            detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if mode == "online" and start_step > 0:
                print(
                    f"note: wandb does not start ({detail}); offline until the next start, then `wandb sync {folder.path}/wandb`",
                    flush=True,
                )
                return self._open_wandb(wandb, "offline", start_step)
            raise UserError("recipe: wandb.mode", f"wandb does not start ({detail})", "run wandb login, or set it to offline") from None

    def start_step(self) -> None:
        self._step_started = time.monotonic()

    def end_step(self, step: int, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Record optimizer step `step`, counted from 1. `loss` is the weighted mean over the step's samples."""
        seconds = time.monotonic() - self._step_started
        if step % self._recipe.output.log_interval and step != self._recipe.steps:
            return
        tokens_per_second = self._recipe.tokens_per_step / seconds
        entry = {
            "step": step,
            "loss": loss,
            "learning_rate": learning_rate,
            "gradient_norm": gradient_norm,
            "tokens": step * self._recipe.tokens_per_step,
            "tokens_per_second": round(tokens_per_second, 2),
            "step_seconds": round(seconds, 4),
            "mfu": round(tokens_per_second * self._flops_per_token / self._peak, 4) if self._peak else None,
            "peak_memory_gb": round(peak_memory_gb(self._device), 3),
        }
        self._record(entry)
        self._folder.write_status(step=step)
        print(self._line(entry), flush=True)

    def validation(self, step: int, loss: float) -> None:
        """Record the validation loss after optimizer step `step`."""
        self._record({"step": step, "validation_loss": loss})
        print(f"step {step}/{self._recipe.steps} | validation loss {loss:.4f}", flush=True)

    def _record(self, entry: dict) -> None:
        self._folder.append_log(entry)
        if self._wandb is not None:
            self._wandb.log({key: value for key, value in entry.items() if value is not None}, step=entry["step"])

    def _line(self, entry: dict) -> str:
        done = entry["step"] - self._start_step
        left = (time.monotonic() - self._started) / done * (self._recipe.steps - entry["step"])
        parts = [
            f"step {entry['step']}/{self._recipe.steps}",
            f"loss {entry['loss']:.4f}",
            f"lr {entry['learning_rate']:.2e}",
            f"grad norm {entry['gradient_norm']:.3f}",
            f"{entry['tokens_per_second']:,.0f} tokens/s",
            f"MFU {entry['mfu']:.1%}" if entry["mfu"] is not None else "",
            f"{entry['peak_memory_gb']:.1f} GB",
            f"left {timedelta(seconds=math.ceil(left))}",
        ]
        return " | ".join(filter(None, parts))

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()
