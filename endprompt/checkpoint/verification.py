"""What tools/verify_checkpoint.py does: all checks of `verify.py`, and the logits of both sides, as one report."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from endprompt.checkpoint.forward import huggingface_logits, megatron_logits, relative_error, sample_positions
from endprompt.checkpoint.verify import Side, Verdict, compare_metadata, compare_tensors
from endprompt.errors import UserError


def tolerance(positions: torch.Tensor) -> torch.Tensor:
    """Largest relative error of the fp32 logits at each position, [length].

    1e-4 for the order of sums over many layers (right conversions show 1e-6), and 1e-7 a position: transformers rounds its
    rotary frequencies to fp32 on the way and is up to 3e-7 of their value off, which turns the fast pairs by up to 0.04 rad
    at position 131071 and shows as 4e-3 in the logits of a random model. A factor or theta that is wrong shows as 0.1 and more.
    """
    return 1e-4 + 1e-7 * positions.float()


def logits_of(side: Side, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """fp32 [length, vocabulary], by transformers for a Hugging Face folder, by Megatron's conventions for its checkpoints."""
    if side.megatron is None:
        return huggingface_logits(side.tensors, side.config, tokens, positions)
    epsilon = side.config.get("rms_norm_eps", 1e-6)
    return megatron_logits(side.megatron, side.architecture, side.rope, epsilon, tokens, positions)


def compare_logits(a: Side, b: Side, positions: torch.Tensor | None = None) -> Verdict:
    """Logits of a fixed random text at `positions` (int64 [length]), by default runs from 0 to the end of the longer window."""
    if positions is None:
        positions = sample_positions(max(side.config["max_position_embeddings"] for side in (a, b)))
    vocabulary = min(a.architecture.vocab_size, b.architecture.vocab_size)
    tokens = torch.randint(0, vocabulary, (len(positions),), generator=torch.Generator().manual_seed(0))
    error = relative_error(*(logits_of(side, tokens, positions)[:, :vocabulary] for side in (a, b)))
    allowed = tolerance(positions)
    worst = int((error / allowed).nan_to_num(float("inf")).argmax())
    verdict = Verdict(facts={
        "logit_positions": positions.tolist(), "logit_relative_error": [float(f"{value:.3g}") for value in error.tolist()],
        "logit_worst_relative_error": float(f"{float(error[worst]):.3g}"),
    })  # fmt: skip
    wrong = (~(error <= allowed)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        verdict.differences.append(
            f"logits at position {int(positions[first])}: relative error {float(error[first]):.2g}, above {float(allowed[first]):.2g} "
            f"({len(wrong)} of {len(error)} positions; worst {float(error[worst]):.2g} at {int(positions[worst])})"
        )
    return verdict


def verify(a: Side, b: Side, *, cast: bool, tensors_only: bool, positions: torch.Tensor | None, quiet: bool = False) -> dict[str, Any]:
    """{"same": bool, "checks": {name: [differences]}, "facts": {...}}. tensors_only: neither metadata nor logits."""
    checks: dict[str, list[str]] = {} if tensors_only else {"metadata": compare_metadata(a, b)}
    both = sum(info.bytes for info in a.tensors.tensors.values())
    passes = 1 + sum(side.megatron is not None for side in (a, b))
    with tqdm(total=both * passes, unit="B", unit_scale=True, desc="tensors", disable=True if quiet else None) as bar:
        tensors = compare_tensors(a, b, cast=cast, progress=bar.update)
    checks["tensors"], facts = tensors.differences, tensors.facts
    if not tensors_only:
        try:
            logits = compare_logits(a, b, positions)
        except (KeyError, RuntimeError, ValueError) as error:  # tensors that are missing or misshapen, and named above
            if not checks["tensors"]:
                raise UserError(b.path, f"its logits cannot be computed ({error})", "compare with --tensors-only") from None
            checks["logits"] = [f"cannot be computed with these tensors ({type(error).__name__})"]
        else:
            checks["logits"], facts = logits.differences, {**facts, **logits.facts}
    return {"same": not any(checks.values()), "checks": checks, "facts": facts}
