"""A plan as JSON and as a table for people. Every predicted number is named as such."""

from __future__ import annotations

from dataclasses import asdict

from endprompt.planning.calibration import OURS, errors
from endprompt.planning.comparison import Comparison
from endprompt.planning.plan import Plan
from endprompt.planning.published import HELD_OUT
from endprompt.planning.search import Proposal, remedy

PREDICTED = (
    "fits", "memory_gb_per_gpu", "memory", "step_seconds", "tokens_per_second", "mfu", "hours", "gpu_hours", "cost", "checkpoint_gb",
    "disk_gb", "full_length.step_seconds", "full_length.gpu_hours", "full_length.memory_gb_per_gpu", "discount.wall_clock",
)  # fmt: skip
"""Fields of the JSON that are predictions. FLOPs and the discounts by FLOPs are counted, not predicted."""


def as_dict(found: Comparison, price: float | None = None, proposals: list[Proposal] | None = None) -> dict:
    """Everything, ready for JSON. price: of a GPU-hour, in any currency. proposals: of a search, when one was asked for."""
    plan, full, recipe = found.plan, found.full, found.plan.recipe
    result = {
        "recipe": recipe.name,
        "engine": plan.engine,
        "predicted": list(PREDICTED),
        "cluster": {key: value for key, value in asdict(plan.cluster).items() if key in ("nodes", "gpus_per_node", "memory_gb")},
        "gpu": "H100-80GB",
        "layout": plan.layout_words,
        "micro_batch_size": recipe.training.micro_batch_size,
        "micro_steps": plan.micro_steps,
        "tokens_per_step": recipe.tokens_per_step,
        "steps": recipe.steps,
        "fits": plan.fits,
        "remedy": None if plan.fits else remedy(plan),
        "memory_gb_per_gpu": round(plan.memory.total_gb, 2),
        "memory": {
            "peak_phase": plan.memory.peak_phase,
            "parts_gb": {part: round(size, 3) for part, size in plan.memory.parts_gb.items()},
            "phases_gb": {name: round(sum(parts.values()) / 1e9, 2) for name, parts in plan.memory.phases.items()},
            "host_gb_per_node": round(plan.host_gb_per_node, 1),
        },
        "flops_per_token": plan.flops_per_token,
        "step_seconds": round(plan.step_seconds, 3),
        "tokens_per_second": round(plan.tokens_per_second, 1),
        "mfu": round(plan.mfu, 4),
        "hours": round(plan.hours, 2),
        "gpu_hours": round(plan.gpu_hours, 1),
        "cost": round(plan.gpu_hours * price, 2) if price is not None else None,
        "checkpoint_gb": round(plan.checkpoint_gb, 1),
        "disk_gb": round(plan.disk_gb, 1),
        "full_length": {
            "physical_length": recipe.target_length,
            "flops_per_token": found.full_flops_per_token,
            "layout": full.layout_words if full else None,
            "recompute": full.recipe.megatron_recompute if full and full.layout else None,
            "memory_gb_per_gpu": round(full.memory.total_gb, 2) if full else None,
            "step_seconds": round(full.step_seconds, 3) if full else None,
            "gpu_hours": round(full.gpu_hours, 1) if full else None,
        },
        "discount": {
            "per_token": round(found.per_token, 4),
            "per_sample": round(found.per_sample, 3),
            "wall_clock": round(found.wall_clock, 3) if full else None,
        },
        "held_out_error": errors(HELD_OUT, OURS[plan.engine][0]),
    }
    if proposals is not None:
        result["search"] = [_proposal(proposal) for proposal in proposals]
    return result


def _proposal(proposal: Proposal) -> dict:
    plan = proposal.plan
    return {
        "layout": plan.layout_words,
        "set": proposal.changes,
        "step_seconds": round(plan.step_seconds, 3),
        "memory_gb_per_gpu": round(plan.memory.total_gb, 2),
        "mfu": round(plan.mfu, 4),
        "gpu_hours": round(plan.gpu_hours, 1),
    }


def text(found: Comparison, price: float | None = None, proposals: list[Proposal] | None = None) -> str:
    """The same for people. Lines marked ~ are predictions."""
    blocks = [_head(found.plan), _memory(found.plan), _time(found.plan, price), _full_length(found), _trust(found.plan)]
    if proposals is not None:
        blocks.append(_search(proposals, found.plan))
    return "\n\n".join(blocks) + "\n\n~ predicted, nothing of it was measured on these GPUs"


def _lines(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<24} {words}" for name, words in rows)


def _head(plan: Plan) -> str:
    recipe, training, positions = plan.recipe, plan.recipe.training, plan.recipe.positions
    settings = recipe.megatron_recompute.replace("none", "no") + " recomputation" if plan.layout else recipe.deepspeed.config
    ranks = plan.layout.data if plan.layout else plan.cluster.gpus
    return _lines(
        [
            ("recipe", f"{recipe.name}: {recipe.positions.scheme}, {positions.physical_length:,} of {recipe.target_length:,} positions"),
            ("cluster", f"{plan.cluster.nodes} node(s) of {plan.cluster.gpus_per_node} H100-80GB"),
            ("engine", f"{plan.engine}: {plan.layout_words}, {settings}"),
            (
                "batch",
                f"{training.global_batch_size} samples = {training.micro_batch_size} x {plan.micro_steps} micro-steps x {ranks} "
                f"data-parallel ranks; {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens",
            ),
        ]
    )


def _memory(plan: Plan) -> str:
    memory = plan.memory
    verdict = "fits" if plan.fits else "DOES NOT FIT: " + remedy(plan)
    rows = [("~ memory a GPU", f"{memory.total_gb:.1f} GB of {plan.cluster.memory_gb:g} GB, {verdict}")]
    rows += [(f"    {part}", f"{size:6.2f} GB") for part, size in memory.parts_gb.items()]
    rows.append(("    (peak phase)", memory.peak_phase))
    if plan.host_gb_per_node:
        rows.append(("~ host memory", f"{plan.host_gb_per_node:,.0f} GB a node"))
    return _lines(rows)


def _time(plan: Plan, price: float | None) -> str:
    cost = f" = {plan.gpu_hours * price:,.0f} at {price:g} each" if price else ""
    a_gpu = plan.tokens_per_second / plan.cluster.gpus
    rows = [
        ("~ step", f"{plan.step_seconds:.2f} s = {plan.tokens_per_second:,.0f} tokens/s, {a_gpu:,.0f} a GPU"),
        ("~ MFU", f"{plan.mfu:.1%} of the dense bf16 peak, causal FLOPs, recomputation not counted"),
        ("~ run", f"{plan.hours:.1f} h = {plan.gpu_hours:,.0f} GPU-hours{cost}"),
        ("~ checkpoint", f"{plan.checkpoint_gb:,.0f} GB each; {plan.disk_gb:,.0f} GB of disk: those kept, one in writing, the export"),
        ("FLOPs a token", f"{plan.flops_per_token / 1e9:.1f} GFLOP"),
    ]
    return _lines(rows)


def _full_length(found: Comparison) -> str:
    full, length = found.full, found.plan.recipe.target_length
    rows = [
        ("full length", f"{length:,} tokens a sample, {found.full_flops_per_token / 1e9:.1f} GFLOP a token"),
        ("discount by FLOPs", f"{found.per_token:.2f} a token, {found.per_sample:.1f} a sample"),
    ]
    if full is None:
        rows.append(("~ full length", f"fits in no layout on {found.plan.cluster.nodes} node(s)"))
    else:
        words = f"{full.step_seconds:.2f} s a step, {full.gpu_hours:,.0f} GPU-hours: {full.layout_words}, {full.engine}"
        rows.append(("~ full length", words))
        rows.append(("~ discount by time", f"{found.wall_clock:.2f} for the same tokens on the same GPUs"))
    return _lines(rows)


def _trust(plan: Plan) -> str:
    found = errors(HELD_OUT, OURS[plan.engine][0])
    words = (
        f"{found['within_15_percent']} of {found['rows']} published H100 rows that were held out are met within 15 %; "
        f"median error {found['median']:.1%}, worst {found['worst']:.1%} (tools/plan.py --calibration)"
    )
    return _lines([("trust in time", words)])


def _search(proposals: list[Proposal], plan: Plan) -> str:
    if not proposals:
        return f"search: no layout of {plan.engine} fits on {plan.cluster.nodes} node(s)"
    lines = [f"{'~ best layouts':<48} {'step':>8} {'memory':>9} {'MFU':>6}  from the recipe by"]
    for proposal in proposals:
        found = proposal.plan
        lines.append(
            f"  {found.layout_words:<46} {found.step_seconds:>6.2f} s {found.memory.total_gb:>6.1f} GB {found.mfu:>6.1%}  "
            f"{proposal.flags or 'the recipe as it stands'}"
        )
    return "\n".join(lines)
