"""Looking at a recipe's positions without a corpus: samples, coverage, and both as JSON or as a table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from endprompt.errors import UserError
from endprompt.positions.builder import SampleBuilder
from endprompt.positions.coverage import Coverage, measure
from endprompt.positions.prompts import KNOWN_LENGTHS, Prompt, PromptTokens, tokenize_prompts, tokenized, words_of
from endprompt.positions.sample import Sample
from endprompt.positions.schemes import SCHEMES
from endprompt.recipe.schema import RecallPrompt, Recipe, TextPrompt

SHOWN_SAMPLES, SHOWN_SEGMENTS, SHOWN_GAPS = 8, 8, 6
"""What the table shows before it says how many more there are; JSON holds all."""


@dataclass(frozen=True)
class Inspection:
    """Samples 0..N-1 of a recipe over stand-in text. `origin`: where the prompt lengths come from, in words."""

    recipe: Recipe
    builder: SampleBuilder
    origin: str
    samples: list[Sample]
    coverage: Coverage


def inspect(recipe: Recipe, samples: int, prompt_length: int | None = None) -> Inspection:
    """Build samples 0..samples-1 of `recipe` and measure their coverage.

    prompt_length: tokens of every prompt's words; None to count them with the checkpoint's tokenizer or the table of
    known prompts. Raises UserError if that is not possible or if the recipe's lengths do not fit.
    """
    from tqdm import tqdm

    prompts, origin = find_prompts(recipe, prompt_length)
    builder = SampleBuilder(recipe.positions, recipe.target_length, prompts, recipe.seed)
    text = np.zeros(builder.source_length, dtype=np.int64)
    progress = tqdm(range(samples), desc="samples", disable=not sys.stderr.isatty(), leave=False)
    built = [builder(text, index) for index in progress]
    return Inspection(recipe, builder, origin, built, measure(built, recipe.target_length, recipe.model.original_length))


def find_prompts(recipe: Recipe, prompt_length: int | None) -> tuple[PromptTokens, str]:
    """The recipe's prompts, with the right lengths if not the right tokens, and where the lengths come from."""
    positions = recipe.positions
    if prompt_length is not None:
        return PromptTokens(tuple(_stand_in(prompt, prompt_length) for prompt in positions.prompts)), "--prompt-length"
    if not SCHEMES[positions.scheme].appends_prompt:
        return PromptTokens(()), f"scheme {positions.scheme} appends no prompt"
    from endprompt.data.tokenizers import VOCABULARY_FILES, load_tokenizer

    folder = Path(recipe.model.path)
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        return tokenize_prompts(positions, load_tokenizer(folder)), f"the tokenizer in {folder}"
    from endprompt.models.architectures import CUSTOM, get_architecture

    architecture = recipe.model.architecture
    family = None if architecture == CUSTOM else get_architecture(architecture).tokenizer
    prompts = []
    for prompt in positions.prompts:
        length = KNOWN_LENGTHS.get(words_of(prompt), {}).get(family)
        if length is None:
            raise UserError(
                f"positions.prompts: {prompt.name}",
                f"its length is unknown: {folder} holds no tokenizer and the table no such words for {architecture}",
                "give --prompt-length N, or put the checkpoint's tokenizer there",
            )
        prompts.append(_stand_in(prompt, length))
    return PromptTokens(tuple(prompts)), f"the built-in table for {family} tokenizers, as there is no tokenizer in {folder}"


def _stand_in(prompt: TextPrompt | RecallPrompt, length: int) -> Prompt:
    return tokenized(prompt, np.zeros(length, dtype=np.int64))


def as_dict(inspection: Inspection) -> dict:
    """Everything, ready for JSON."""
    recipe, builder = inspection.recipe, inspection.builder
    positions = recipe.positions
    return {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "scheme": positions.scheme,
        "physical_length": positions.physical_length,
        "target_length": recipe.target_length,
        "original_length": recipe.model.original_length,
        "source_length": builder.source_length,
        "displaced_length": positions.displaced_length,
        "prompts": [{"name": prompt.name, "length": prompt.length, "weight": prompt.weight} for prompt in _drawable(builder)],
        "prompt_lengths_from": inspection.origin,
        "samples": [
            {
                "index": index,
                "prompt": prompt.name if (prompt := builder.draw_prompt(index)) else None,
                "position_ids": sample.position_ids.tolist(),
                "loss_weights": sample.loss_weights.tolist(),
            }
            for index, sample in enumerate(inspection.samples)
        ],
        "coverage": inspection.coverage.as_dict(),
    }


def _drawable(builder: SampleBuilder) -> tuple[Prompt, ...]:
    return builder.prompts.prompts if builder.scheme.appends_prompt else ()


def segments(position_ids: np.ndarray) -> list[tuple[int, int]]:
    """Physical ranges (first, last), both inclusive, within which positions grow by 1."""
    starts = [0, *(np.flatnonzero(np.diff(position_ids) != 1) + 1).tolist()]
    return [(start, end - 1) for start, end in zip(starts, [*starts[1:], len(position_ids)], strict=True)]


def table(inspection: Inspection) -> str:
    """The same for people."""
    return "\n\n".join([_head(inspection), *_sample_tables(inspection), _coverage_table(inspection)])


def _head(inspection: Inspection) -> str:
    recipe, builder = inspection.recipe, inspection.builder
    positions, target, original = recipe.positions, recipe.target_length, recipe.model.original_length
    rows = [
        ("recipe", recipe.name),
        ("scheme", positions.scheme),
        ("physical length", f"{positions.physical_length:,} tokens, made from {builder.source_length:,} tokens of text"),
        ("target length", f"{target:,} positions = {target / original:g} x the original window of {original:,}"),
    ]
    if builder.scheme.appends_prompt:
        c = positions.displaced_length
        if positions.scheme != "short":
            rows.append(("displaced length", f"{c:,} tokens" if c else "the drawn prompt's own length"))
        names = [f"{prompt.name} ({prompt.length} tokens, weight {prompt.weight:g})" for prompt in _drawable(builder)]
        rows.append(("prompts", ", ".join(names)))
        rows.append(("loss weight", f"{positions.prompt_loss_weight:g} for prompt tokens, 1 for the body"))
    rows.append(("prompt lengths", f"from {inspection.origin}" if builder.scheme.appends_prompt else inspection.origin))
    return "\n".join(f"{name:<17} {text}" for name, text in rows)


def _sample_tables(inspection: Inspection) -> list[str]:
    tables = []
    for index, sample in enumerate(inspection.samples[:SHOWN_SAMPLES]):
        prompt = inspection.builder.draw_prompt(index)
        n = len(sample.position_ids)
        begins = n - prompt.length if prompt else n
        lines = [f"sample {index}" + (f", prompt {prompt.name} is tokens {_span(begins, n - 1)}" if prompt else "")]
        found = segments(sample.position_ids)
        for first, last in found[:SHOWN_SEGMENTS]:
            start, end = sample.position_ids[first], sample.position_ids[last]
            content = "body" if last < begins else "prompt" if first >= begins else f"body, {last - begins + 1:,} of the prompt"
            lines.append(f"  tokens {_span(first, last):<20} {last - first + 1:>9,}  at positions  {_span(start, end):<20} {content}")
        if len(found) > SHOWN_SEGMENTS:
            lines.append(f"  and {len(found) - SHOWN_SEGMENTS:,} more segments")
        tables.append("\n".join(lines))
    if len(inspection.samples) > SHOWN_SAMPLES:
        tables.append(f"and {len(inspection.samples) - SHOWN_SAMPLES:,} more samples, counted below")
    return tables


def _coverage_table(inspection: Inspection) -> str:
    coverage = inspection.coverage
    target, count = coverage.target_length, coverage.samples
    lines = [f"relative distances over {count:,} sample{'s' if count != 1 else ''}"]
    lines.append(f"  shown              {coverage.shown:,} of {target:,} ({coverage.shown / target:.2%})")
    widest = sorted(coverage.gaps, key=lambda gap: gap[0] - gap[1])[:SHOWN_GAPS]
    for first, last in sorted(widest):
        lines.append(f"  never shown        {_span(first, last)} = {last - first + 1:,} ({(last - first + 1) / target:.2%})")
    if len(coverage.gaps) > SHOWN_GAPS:
        lines.append(f"                     and {len(coverage.gaps) - SHOWN_GAPS:,} narrower gaps")
    lines.append(
        f"  pairs beyond the original window of {coverage.original_length:,}: {coverage.far_pairs / count:,.0f} of "
        f"{coverage.pairs / count:,.0f} a sample ({coverage.far_pairs / coverage.pairs:.3%})"
    )
    lines.append(f"  loss terms predicted from beyond it: {coverage.far_predictions:,.1f} a sample")
    lines.append("")
    lines.append(f"  {'distance':<17} {'pairs a sample':>16} {'share':>9}   distances shown")
    for row in coverage.histogram():
        shown = f"{row['shown']:,} of {row['last'] - row['first'] + 1:,}"
        pairs = f"{row['pairs'] / count:>16,.1f} {row['pairs'] / coverage.pairs:>9.3%}"
        lines.append(f"  {_span(row['first'], row['last']):<17} {pairs}   {shown}")
    return "\n".join(lines)


def _span(first: int, last: int) -> str:
    """A range of whole numbers, both ends included."""
    return f"{first:,}..{last:,}" if last > first else f"{first:,}"
