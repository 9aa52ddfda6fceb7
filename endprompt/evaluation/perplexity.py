"""Perplexity by position: how well a token is predicted as a function of how many tokens stand before it.

Windows of `length` tokens slide over long documents; each is read whole, at positions 0..length-1, and the NLL of every
token goes into the bucket of its position. The curve should go on falling beyond the original window; where a model's
positions fail, it rises.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedTokenizerBase

from endprompt.errors import UserError
from endprompt.evaluation.model import EvaluationModel
from endprompt.evaluation.text import Document, encode, prefix_tokens

FIRST_BUCKET = 256
"""Positions of the first log-spaced bucket: below it perplexity is about the text's beginning, not about positions."""


@dataclass(frozen=True)
class PerplexitySettings:
    """length: tokens of a window; stride: between the starts of windows; windows: how many are read, over all documents;
    bucket: positions per bucket, or None for log-spaced ones (two per octave from FIRST_BUCKET)."""

    length: int
    stride: int
    windows: int
    bucket: int | None = None


def bucket_edges(length: int, bucket: int | None) -> list[int]:
    """Ascending edges from 0 to length: bucket i holds positions edges[i] .. edges[i + 1] - 1.

    The last bucket is shorter when length is no edge, and joined to the one before when it would be under half as long.
    """
    if bucket:
        edges = list(range(0, length, bucket))
    else:
        edges, octaves = [0], 0
        while (edge := round(FIRST_BUCKET * 2 ** (octaves / 2))) < length:
            edges.append(edge)
            octaves += 1
    if len(edges) > 2 and 2 * (length - edges[-1]) < edges[-1] - edges[-2]:
        edges.pop()
    return [*edges, length]


def choose_windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[Document], settings: PerplexitySettings
) -> list[tuple[str, list[int]]]:
    """(document name, token ids [length]) of the windows to read: evenly spread over all that the documents hold.

    A window never crosses a document. Each starts with the tokenizer's prefix if it has one. Raises UserError when no
    document is long enough.
    """
    prefix = prefix_tokens(tokenizer)
    room, found, longest = settings.length - len(prefix), [], 0
    for document in documents:
        ids = encode(tokenizer, document.text)
        longest = max(longest, len(ids))
        found += [(document.name, ids, start) for start in range(0, len(ids) - room + 1, settings.stride)]
    if not found:
        raise UserError("--text", f"its longest document has {longest} tokens", f"give a document of {room} or more, or a shorter --length")
    count = min(settings.windows, len(found))
    chosen = [found[int((i + 0.5) * len(found) / count)] for i in range(count)]
    return [(name, prefix + ids[start : start + room]) for name, ids, start in chosen]


def window_nll(model: EvaluationModel, tokens: list[int], bar: tqdm | None = None) -> torch.Tensor:
    """NLL in nats of tokens 1..n-1 of one window given all before them: fp32 [n - 1], read in chunks over one cache."""
    ids = torch.tensor(tokens)
    inputs, labels = ids[None, :-1], ids[1:]
    nll = []
    for start, hidden in model.stream(inputs, torch.arange(len(ids) - 1)[None], DynamicCache()):
        nll.append(model.score(hidden[0], labels[start : start + hidden.shape[1]])[0])
        if bar is not None:
            bar.update(hidden.shape[1])
    return torch.cat(nll)


def measure_perplexity(model: EvaluationModel, windows: list[tuple[str, list[int]]], settings: PerplexitySettings, label: str) -> dict:
    """NLL of the windows of `choose_windows`, summed up by bucket.

    Per bucket: start and end (exclusive) in positions, tokens scored, nll in nats per token, ppl = exp(nll).
    JSON-ready. Position 0 has nothing before it and is not scored. Sums are kept in float64.
    """
    edges = bucket_edges(settings.length, settings.bucket)
    bucket_of = torch.bucketize(torch.arange(1, settings.length), torch.tensor(edges[1:]), right=True)
    sums = torch.zeros(len(edges) - 1, dtype=torch.float64)
    with tqdm(total=len(windows) * (settings.length - 1), desc=f"{label}: perplexity", unit="token", unit_scale=True, disable=None) as bar:
        for _, tokens in windows:
            sums.index_add_(0, bucket_of, window_nll(model, tokens, bar).double())
    tokens_in = torch.bincount(bucket_of, minlength=len(sums)) * len(windows)
    means = (sums / tokens_in).tolist()
    return {
        "fingerprint": hashlib.sha256(str(windows).encode()).hexdigest()[:16],
        "windows": len(windows),
        "documents": sorted({name for name, _ in windows}),
        "nll": float(sums.sum() / tokens_in.sum()),
        "ppl": math.exp(sums.sum() / tokens_in.sum()),
        "buckets": [
            {"start": edges[i], "end": edges[i + 1], "tokens": int(tokens_in[i]), "nll": means[i], "ppl": math.exp(means[i])}
            for i in range(len(means))
        ],
    }
