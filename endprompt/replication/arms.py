"""Train and evaluate several arms of one recipe: same data, same budget, same engine; scheme and rope differ.

Every arm is an ordinary ds_train.py run with overrides, so an interrupted comparison goes on where it was, and a single
arm can be repeated by hand with the command that is printed.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from endprompt.atomic import write_json
from endprompt.commands import ROOT, run_step
from endprompt.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Arm:
    """One scheme under one rope scaling; `overrides` turn the base recipe into it."""

    scheme: str
    rope: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.scheme}-{self.rope}"


def plan_arms(recipe_file: str, schemes: list[str], ropes: list[str], overrides: list[str], output: Path) -> list[tuple[Arm, Recipe]]:
    """Every scheme under every rope, each recipe checked before anything is trained. Raises UserError."""
    arms = []
    for rope in ropes:
        for scheme in schemes:
            arm = Arm(scheme, rope, (f"positions.scheme={scheme}", f"rope.type={rope}", f"output.directory={output / f'{scheme}-{rope}'}"))
            arms.append((arm, load_recipe(recipe_file, [*overrides, *arm.overrides])))
    return arms


def train_arm(recipe_file: str, arm: Arm, overrides: list[str], processes: int | None) -> None:
    """Run ds_train.py for the arm; a finished arm ends at once. Raises UserError when it does not finish."""
    sets = [word for override in (*overrides, *arm.overrides) for word in ("--set", override)]
    command = [sys.executable, str(ROOT / "ds_train.py"), "--recipe", recipe_file, *sets]
    command += ["--nproc-per-node", str(processes)] if processes else []
    run_step(command, what=f"arm {arm.name}")


def summarise_arm(arm: Arm, recipe: Recipe) -> dict:
    """Median step time, speed and peak memory of a finished arm, from its log (the first step is warm-up)."""
    entries = [json.loads(line) for line in (Path(recipe.output.directory) / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "loss" in entry]
    validation = [entry["validation_loss"] for entry in entries if "validation_loss" in entry]
    timed = steps[1:] or steps
    return {
        "arm": arm.name,
        "steps": len(steps),
        "tokens": steps[-1]["tokens"],
        "final_loss": steps[-1]["loss"],
        "validation_loss": validation[-1] if validation else None,
        "median_step_seconds": statistics.median(entry["step_seconds"] for entry in timed),
        "median_tokens_per_second": statistics.median(entry["tokens_per_second"] for entry in timed),
        "mfu": timed[-1]["mfu"],
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in steps),
        "export": str(Path(recipe.output.directory) / "export"),
    }


def write_summary(path: Path, rows: list[dict], machine: dict, command: str) -> str:
    """summary.json beside the arms, and the same as a table."""
    write_json(path, {"command": command, "machine": machine, "arms": rows})
    header = f"{'arm':<28}{'steps':>7}{'loss':>9}{'validation':>12}{'s/step':>9}{'tokens/s':>11}{'GB':>7}"
    lines = [header, "-" * len(header)]
    for row in rows:
        validation = f"{row['validation_loss']:.4f}" if row["validation_loss"] is not None else "-"
        lines.append(
            f"{row['arm']:<28}{row['steps']:>7}{row['final_loss']:>9.4f}{validation:>12}{row['median_step_seconds']:>9.2f}"
            f"{row['median_tokens_per_second']:>11,.0f}{row['peak_memory_gb']:>7.1f}"
        )
    return "\n".join(lines)
