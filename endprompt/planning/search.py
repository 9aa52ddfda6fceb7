"""The fastest layout that fits: every layout that divides, predicted. And what to change where a recipe does not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from endprompt.errors import UserError
from endprompt.planning.cluster import Cluster
from endprompt.planning.plan import Engine, Plan, architecture_of, make_plan
from endprompt.recipe import Recipe

SITUATIONS = ("deepspeed_configs/zero3.json", "deepspeed_configs/zero3_offload_optimizer.json", "deepspeed_configs/zero3_offload.json")
MICRO_BATCHES = (1, 2, 4, 8)
MOST_NODES = 64

ROOM = 0.9
"""Share of a GPU's memory that a proposed layout may fill: predictions are tested to 10 %."""


@dataclass(frozen=True)
class Proposal:
    """A plan that fits, and the fields that lead to it from the recipe as it stands."""

    plan: Plan
    changes: dict[str, object]

    @property
    def flags(self) -> str:
        return " ".join(f"--set {field}={_yaml(value)}" for field, value in self.changes.items())


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def search(
    recipe: Recipe, engine: Engine, cluster: Cluster, *, micro_batches: tuple[int, ...] = MICRO_BATCHES, best: int = 5
) -> list[Proposal]:
    """The `best` fastest layouts that fit with room to spare, fastest first; of equally fast ones the one that needs less memory.

    What is trained stays: only `megatron`, `deepspeed.config` and the micro-batch change.
    """
    found = []
    for changes in _candidates(recipe, engine, cluster, micro_batches):
        try:
            plan = make_plan(_changed(recipe, changes), engine, cluster)
        except UserError:
            continue  # does not divide
        if plan.fits and plan.memory.total_gb <= ROOM * cluster.memory_gb:
            found.append(Proposal(plan, {field: value for field, value in changes.items() if value != _value(recipe, field)}))
    found.sort(key=lambda proposal: (round(proposal.plan.step_seconds, 3), proposal.plan.memory.total_gb))
    return found[:best]


def remedy(plan: Plan) -> str:
    """One line for a plan that does not fit: the fields to set on these nodes, or how many nodes it takes."""
    over = f"needs {plan.memory.total_gb:.1f} GB of the {plan.cluster.memory_gb:g} GB a GPU has"
    if plan.host_gb_per_node > plan.cluster.host_memory_gb:
        over = f"needs {plan.host_gb_per_node:,.0f} GB of the {plan.cluster.host_memory_gb:,.0f} GB of host memory a node has"
    proposals = search(plan.recipe, plan.engine, plan.cluster, best=1)
    if proposals:
        return f"{over}; {proposals[0].flags} makes it {proposals[0].plan.memory.total_gb:.1f} GB{_host(proposals[0].plan)}"
    nodes = plan.cluster.nodes * 2
    while nodes <= MOST_NODES:
        larger = search(plan.recipe, plan.engine, with_nodes(plan.cluster, nodes), best=1)
        if larger:
            return f"{over}, and no layout fits on these nodes; use --nodes {nodes} {larger[0].flags}".rstrip()
        nodes *= 2
    fix = "use --engine megatron, which cuts the sequence" if plan.engine == "deepspeed" else "lower positions.physical_length"
    return f"{over}, and no layout fits on up to {MOST_NODES} nodes; {fix}"


def _host(plan: Plan) -> str:
    return f" and {plan.host_gb_per_node:,.0f} GB of host memory a node" if plan.host_gb_per_node else ""


def fewest_nodes(recipe: Recipe, engine: Engine, cluster: Cluster) -> int:
    """Nodes (1, 2, 4, ... 64) that the recipe fits on as it stands. Raises UserError where it fits on none."""
    nodes, reason = 1, f"fits on no number of nodes up to {MOST_NODES} as it stands"
    while nodes <= MOST_NODES:
        try:
            if make_plan(recipe, engine, with_nodes(cluster, nodes)).fits:
                return nodes
        except UserError as error:
            reason = f"{error.problem} on {nodes} node(s)" if nodes == 1 else reason
        nodes *= 2
    raise UserError(f"recipe {recipe.name}", reason, "give --nodes with --search to see what would")


def full_length(recipe: Recipe) -> Recipe:
    """The same run with whole samples of target_length instead: as many tokens a step and in all (at least one sample)."""
    positions = recipe.positions.model_copy(update={"scheme": "full", "physical_length": recipe.target_length, "displaced_length": None})
    batch = max(1, recipe.tokens_per_step // recipe.target_length)
    training = recipe.training.model_copy(update={"global_batch_size": batch, "micro_batch_size": 1, "activation_checkpointing": True})
    return recipe.model_copy(update={"name": f"{recipe.name}_full", "positions": positions, "training": training})


def with_nodes(cluster: Cluster, nodes: int) -> Cluster:
    return replace(cluster, nodes=nodes)


def _candidates(recipe: Recipe, engine: Engine, cluster: Cluster, micro_batches: tuple[int, ...]) -> Iterator[dict[str, object]]:
    batch = recipe.training.global_batch_size
    micro = [size for size in micro_batches if batch % size == 0]
    if engine == "deepspeed":
        for size in micro:
            for config in SITUATIONS:
                yield {"training.micro_batch_size": size, "deepspeed.config": config}
        return
    layers = architecture_of(recipe).layers
    # selective takes longer than none and saves nothing (megatron_memory)
    recomputations = ("none", "full") if recipe.training.activation_checkpointing else (recipe.megatron.recompute,)
    stages = [p for p in range(1, min(layers, cluster.gpus) + 1) if layers % p == 0]
    for tensor in _powers(cluster.gpus_per_node):
        for context in _powers(cluster.gpus // tensor):
            for pipeline in stages:
                if tensor * context * pipeline > cluster.gpus:
                    break
                per_stage = layers // pipeline
                chunks = [v for v in range(1, per_stage + 1) if per_stage % v == 0] if pipeline > 1 else [1]
                for virtual in chunks:
                    for recompute in recomputations:
                        for size in micro:
                            yield {
                                "megatron.tensor_parallel": tensor,
                                "megatron.pipeline_parallel": pipeline,
                                "megatron.virtual_pipeline": virtual,
                                "megatron.context_parallel": context,
                                "megatron.recompute": recompute,
                                "training.micro_batch_size": size,
                            }


def _powers(most: int) -> list[int]:
    return [2**k for k in range(most.bit_length()) if 2**k <= most]


def _changed(recipe: Recipe, changes: dict[str, object]) -> Recipe:
    sections: dict[str, dict[str, object]] = {}
    for field, value in changes.items():
        section, name = field.split(".")
        sections.setdefault(section, {})[name] = value
    return recipe.model_copy(update={name: getattr(recipe, name).model_copy(update=fields) for name, fields in sections.items()})


def _value(recipe: Recipe, field: str) -> object:
    section, name = field.split(".")
    return getattr(getattr(recipe, section), name)
