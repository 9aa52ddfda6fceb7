"""Sample k of a run, as a pure function of (seed, k): which text, in which order, from which dataset of the blend."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from endprompt.data.blend import Blend
from endprompt.data.indexed import IndexedText, open_indexed
from endprompt.data.shuffle import Permutation, key_of
from endprompt.data.sidecar import read_sidecar, sidecar_path
from endprompt.errors import UserError

if TYPE_CHECKING:
    from endprompt.positions import Sample, SampleBuilder
    from endprompt.recipe.schema import Source


class SampleDataset:
    """Blended, shuffled samples without end; `dataset[k]` is the same in any process, order and world size.

    The token stream of a source is cut into chunks of physical_length tokens. A sample reads builder.source_length tokens
    from the beginning of its chunk on, past the end of the stream from its start again. Every epoch of a source visits
    each chunk once, in an order of its own, with the cuts shifted by an offset of its own (so that over epochs every
    token is seen at every place of a sample). The text of sample k is the same for every scheme of equal physical_length.

    sources: the recipe's list of data.train or data.validation. builder: makes a sample from (tokens, k).
    vocab_size: the model's; a token at or above it is a UserError, found from the sidecar when opening, else when read.

    Raises UserError for a dataset that cannot be opened or is shorter than one sample.
    """

    def __init__(self, sources: list[Source], builder: SampleBuilder, seed: int, *, vocab_size: int | None = None):
        self.builder, self._seed, self._vocab_size = builder, seed, vocab_size
        self._stride = builder.positions.physical_length
        self._blend = Blend([source.weight for source in sources])
        self._weights = [source.weight for source in sources]
        self._texts = [self._open(source.path) for source in sources]

    def _open(self, prefix: str) -> IndexedText:
        text = open_indexed(prefix)
        needed = max(self._stride, self.builder.source_length)
        if text.num_tokens < needed:
            raise UserError(
                prefix, f"has {text.num_tokens} tokens, one sample reads {needed}", "prepare more text or lower positions.physical_length"
            )
        sidecar = read_sidecar(prefix) or {}
        if self._vocab_size is not None and sidecar.get("max_token_id", 0) >= self._vocab_size:
            raise self._out_of_range(prefix, sidecar["max_token_id"])
        return text

    @property
    def samples_per_epoch(self) -> int:
        """Chunks of all sources together: with one source, the samples after which its text comes again."""
        return sum(self._chunks(text) for text in self._texts)

    def fingerprint(self) -> str:
        """16 hex digits that change when the data does: weights, document lengths and 64 spots of every token stream.

        Reads no more than 64 x 1024 tokens a source, so it costs milliseconds for any size.
        """
        digest = hashlib.sha256(repr(self._weights).encode())
        for text in self._texts:
            digest.update(text.document_starts.tobytes())
            length = min(1024, text.num_tokens)
            for spot in np.linspace(0, text.num_tokens - length, 64).astype(np.int64):
                digest.update(text.read(int(spot), length).tobytes())
        return digest.hexdigest()[:16]

    def __getitem__(self, k: int) -> Sample:
        """Sample k >= 0. Raises UserError for a token outside of the vocabulary."""
        if k < 0:
            raise IndexError(f"sample {k}: samples are numbered from 0")
        number, i = self._blend[k]
        tokens = self._read(number, i)
        if self._vocab_size is not None and not 0 <= tokens.min() <= tokens.max() < self._vocab_size:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise self._out_of_range(self._texts[number].prefix, int(worst))
        return self.builder(tokens, k)

    def _chunks(self, text: IndexedText) -> int:
        return text.num_tokens // self._stride

    def _read(self, number: int, i: int) -> np.ndarray:
        """int64 [source_length]: the text of sample i of source `number`."""
        text = self._texts[number]
        epoch, place = divmod(i, self._chunks(text))
        chunk = Permutation(self._chunks(text), key_of(f"order {self._seed} {number} {epoch}"))[place]
        offset = key_of(f"offset {self._seed} {number} {epoch}") % self._stride
        start = (offset + chunk * self._stride) % text.num_tokens
        length = self.builder.source_length
        inside = min(length, text.num_tokens - start)
        tokens = text.read(start, inside)
        return tokens if inside == length else np.concatenate([tokens, text.read(0, length - inside)])

    def _out_of_range(self, prefix: str | Path, token: int) -> UserError:
        name = (read_sidecar(prefix) or {}).get("tokenizer", {}).get("name")
        made_by = f" (made with tokenizer {name}, says {sidecar_path(prefix)})" if name else ""
        return UserError(
            prefix,
            f"holds token {token}, the model's vocabulary has {self._vocab_size}{made_by}",
            "prepare the data with the model's own tokenizer: tools/prepare_data.py --tokenizer MODEL",
        )
