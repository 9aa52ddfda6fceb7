"""A recipe beside full-length training: the discount by FLOPs and by predicted time, and the README's table of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from endprompt.errors import UserError
from endprompt.models.architectures import training_flops_per_token
from endprompt.planning.cluster import Cluster
from endprompt.planning.plan import ENGINES, Engine, Plan, make_plan
from endprompt.planning.search import fewest_nodes, full_length, search, with_nodes
from endprompt.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Comparison:
    """full: the counterpart's plan on the same cluster, None where no layout of it fits there."""

    plan: Plan
    full: Plan | None

    @property
    def full_flops_per_token(self) -> float:
        return training_flops_per_token(self.plan.architecture, self.plan.recipe.target_length)

    @property
    def per_token(self) -> float:
        """FLOPs of a token at full length over those of a token of this recipe."""
        return self.full_flops_per_token / self.plan.flops_per_token

    @property
    def per_sample(self) -> float:
        """The same for a whole sample, which is target_length against physical_length tokens."""
        return self.per_token * self.plan.recipe.target_length / self.plan.recipe.positions.physical_length

    @property
    def wall_clock(self) -> float | None:
        """Predicted seconds a token at full length over this recipe's, on the same GPUs."""
        return self.plan.tokens_per_second / self.full.tokens_per_second if self.full else None


def compare(plan: Plan) -> Comparison:
    """Against the fastest full-length layout of either engine. ZeRO-3 cuts no sequence: one sample a GPU must fit, and be there."""
    if plan.recipe.positions.physical_length == plan.recipe.target_length:
        return Comparison(plan, plan)
    whole = full_length(plan.recipe)
    found = [proposal.plan for engine in ENGINES for proposal in search(whole, engine, plan.cluster, micro_batches=(1,), best=1)]
    return Comparison(plan, min(found, key=lambda full: full.step_seconds, default=None))


def compare_files(path: Path, overrides: list[str], engine: Engine, cluster: Cluster, nodes: int | None) -> Comparison:
    """A recipe file against the file NAME_full.yaml beside it, both as they stand, on `nodes` or the fewest that both fit on."""
    counterpart = path.with_name(f"{path.stem}_full.yaml")
    if not counterpart.is_file():
        raise UserError(path, f"has no counterpart {counterpart.name} beside it", "write one, or plan the recipe without --table")
    recipe, full = load_recipe(path, overrides), load_recipe(counterpart, overrides)
    if nodes is None:
        nodes = max(fewest_nodes(recipe, engine, cluster), fewest_nodes(full, "megatron", cluster))
    there = with_nodes(cluster, nodes)
    return Comparison(make_plan(recipe, engine, there), make_plan(full, "megatron", there))


def markdown(comparisons: list[Comparison]) -> str:
    """The README's table: predicted time and GPU-hours of both, and the three discounts."""
    side = "| GB a GPU | step | GPU-hours "
    lines = [
        f"| recipe | nodes | its layout {side}| full-length layout {side}| discount: FLOPs a token | FLOPs a sample | GPU-hours |",
        f"|---|--:|---|{'--:|' * 3}---|{'--:|' * 6}",
    ]
    for found in comparisons:
        plan, full = found.plan, found.full
        cells = [plan.recipe.name, str(plan.cluster.nodes), *_cells(plan), *_cells(full)]
        cells += [f"{found.per_token:.2f}", f"{found.per_sample:.0f}", f"{full.gpu_hours / plan.gpu_hours:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(plan: Plan) -> list[str]:
    room = "" if plan.fits else " (does not fit)"
    return [plan.layout_words, f"{plan.memory.total_gb:.0f}{room}", f"{plan.step_seconds:.1f} s", f"{plan.gpu_hours:,.0f}"]


def recipe_pairs(paths: list[Path]) -> list[Path]:
    """The files to put in a table: full-length counterparts named beside their recipe count once."""
    return [path for path in paths if not path.stem.endswith("_full")]


def load_and_plan(path: Path, overrides: list[str], engine: Engine, cluster: Cluster, nodes: int | None) -> tuple[Recipe, Cluster]:
    """The recipe and the cluster it is planned for: `nodes`, or the fewest that it fits on as it stands (one if none)."""
    recipe = load_recipe(path, overrides)
    if nodes is None:
        try:
            nodes = fewest_nodes(recipe, engine, cluster)
        except UserError:
            nodes = 1
    return recipe, with_nodes(cluster, nodes)
