"""Prove that two checkpoints hold the same model: every tensor bit by bit in both formats, metadata, digests, and logits.

Sides are Hugging Face folders or Megatron checkpoints, in any combination. Tensors are compared in Hugging Face's form, and
where one side is Megatron's in that form too, through the inverse runs of the table. Logits are the check that shares no code
with the conversion: transformers computes one side, Megatron's conventions written out in `forward.py` the other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from endprompt.checkpoint.digests import ALGORITHM, Digest, algorithm_of
from endprompt.checkpoint.locate import find_checkpoint, is_megatron
from endprompt.checkpoint.provenance import CONVERSION, recorded_digests, weights_digest
from endprompt.checkpoint.safetensors_files import SafetensorsFolder, TensorInfo
from endprompt.checkpoint.to_huggingface import describe_model
from endprompt.checkpoint.to_megatron import EMBEDDING, HEAD
from endprompt.checkpoint.torch_dist import TorchDistCheckpoint
from endprompt.checkpoint.views import TORCH_DTYPES, HuggingFaceView, MegatronView, TensorReader, row_blocks
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture, architecture_of_config
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, describe

METADATA = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "hidden_act",
)  # fmt: skip
"""Keys of config.json that decide what the model computes or how far it reaches; the rotary keys are compared as a table."""


@dataclass(frozen=True)
class Side:
    """One of the two checkpoints. tensors: in Hugging Face's form. megatron: in Megatron's, None for a Hugging Face folder."""

    path: Path
    tensors: TensorReader
    megatron: TorchDistCheckpoint | None
    architecture: Architecture
    config: dict[str, Any]
    rope: RopeScaling


@dataclass
class Verdict:
    """differences: one line each, in the order found; empty where the two are the same model. facts: what was measured."""

    differences: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        return not self.differences


def open_side(path: Path, *, step: int | None = None, hf_config: Path | None = None, recipe: Recipe | None = None) -> Side:
    """Open either format; hf_config and recipe are for Megatron checkpoints that do not describe themselves. Raises UserError."""
    if not path.is_dir():
        raise UserError(path, "no such folder", "give a Hugging Face folder or a Megatron checkpoint")
    if is_megatron(path):
        folder, _ = find_checkpoint(path, step)
        model = describe_model(folder, hf_config, recipe, None)
        raw = TorchDistCheckpoint(folder)
        view = HuggingFaceView(raw, model.architecture, folder)
        config = model.exported_config()
        return Side(folder, view, raw, model.architecture, config, rope_of_config(config))
    config = load_hf_config(path)
    return Side(path, SafetensorsFolder(path), None, architecture_of_config(config), config, rope_of_config(config))


def compare_metadata(a: Side, b: Side) -> list[str]:
    found = []
    for key in METADATA:
        mine, theirs = a.config.get(key), b.config.get(key)
        if mine != theirs and not (key == "tie_word_embeddings" and not mine and not theirs):
            found.append(f"config {key}: {mine!r} against {theirs!r}")
    if a.rope != b.rope:
        found.append(f"config rope: {describe(a.rope)} against {describe(b.rope)}")
    return found


def compare_tensors(a: Side, b: Side, *, cast: bool = False, progress: Callable[[int], None] = lambda count: None) -> Verdict:
    """Every tensor of both sides by name, dtype, shape and bits; cast: where dtypes differ, compare in the narrower one."""
    verdict = Verdict()
    left, right = _names(a), _names(b)
    verdict.differences += [f"{name}: only in {a.path}" for name in left if name not in right]
    verdict.differences += [f"{name}: only in {b.path}" for name in right if name not in left]
    records = [recorded_digests(side.path) for side in (a, b)]
    algorithms = [{ALGORITHM, *map(algorithm_of, record.values())} for record in records]
    digests: tuple[dict, dict] = ({}, {})
    for name in left:
        if name in right:
            difference, *both = _compare(a.tensors, b.tensors, name, cast, progress, algorithms)
            verdict.differences += [difference] if difference else []
            digests[0][name], digests[1][name] = both
    for side, own, record, letter in zip((a, b), digests, records, "ab", strict=True):
        shown = {name: texts.get(ALGORITHM, "") for name, texts in own.items()}
        verdict.facts[f"weights_digest_{letter}"] = weights_digest(side.tensors.tensors, shown)
        verdict.differences += _compare_with_record(side, own, record)
    verdict.facts["tensors"] = len(digests[0])
    for side, other in ((a, b), (b, a)):
        if side.megatron is not None and verdict.same and not cast:
            verdict.differences += _compare_packed(side, other, progress)
    return verdict


def _names(side: Side) -> dict[str, TensorInfo]:
    """Tensors by name. The copy of tied embeddings that some files hold and old rotary buffers are no parameters."""
    drop = {HEAD} if side.architecture.tied and EMBEDDING in side.tensors.tensors else set()
    return {name: info for name, info in side.tensors.tensors.items() if name not in drop and not name.endswith(".rotary_emb.inv_freq")}


def _compare(
    a: TensorReader,
    b: TensorReader,
    name: str,
    cast: bool,
    progress: Callable[[int], None],
    algorithms: Sequence[Collection[str]] = ((), ()),
) -> tuple[str | None, dict[str, str], dict[str, str]]:
    """(what differs first, digests in a, digests in b), digests by the algorithms asked for on each side."""
    mine, theirs = a.tensors[name], b.tensors[name]
    difference = None
    if mine.shape != theirs.shape:
        difference = f"{name}: shape {list(mine.shape)} against {list(theirs.shape)}"
    elif mine.dtype != theirs.dtype and not cast:
        difference = f"{name}: dtype {mine.dtype} against {theirs.dtype}"
    if difference:
        return difference, {}, {}
    hashes = [Digest(names) for names in algorithms]
    wider = max(mine, theirs, key=lambda info: info.row_bytes)
    for start, stop in row_blocks(wider):
        blocks = []
        for reader, info, digest in ((a, mine, hashes[0]), (b, theirs, hashes[1])):
            block = bytearray((stop - start) * info.row_bytes)
            reader.read(name, start, stop, memoryview(block))
            digest.update(block)
            blocks.append(block)
        progress(len(blocks[0]))
        if difference is None and not (mine.dtype == theirs.dtype and blocks[0] == blocks[1]):
            difference = _first_difference(name, start, blocks, mine, theirs)
    return difference, hashes[0].texts(), hashes[1].texts()


def _first_difference(name: str, start: int, blocks: list[bytearray], mine: TensorInfo, theirs: TensorInfo) -> str | None:
    narrow = min((mine.dtype, theirs.dtype), key=lambda dtype: TORCH_DTYPES[dtype].itemsize)
    pair = [torch.frombuffer(block, dtype=TORCH_DTYPES[info.dtype]) for block, info in zip(blocks, (mine, theirs), strict=True)]
    x, y = (part.to(TORCH_DTYPES[narrow]) for part in pair)
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    different = (x.view(bits) != y.view(bits)).nonzero()
    if not len(different):
        return None
    at = int(different[0])
    width = max(1, mine.row_bytes // TORCH_DTYPES[mine.dtype].itemsize)
    place = [start + at // width, *([at % width] if len(mine.shape) > 1 else [])]
    return f"{name}: {float(x[at]):g} against {float(y[at]):g} at {place}, {len(different)} numbers differ in this block"


def _compare_packed(side: Side, other: Side, progress: Callable[[int], None]) -> list[str]:
    """The Megatron side against the other one packed as Megatron does: the inverse direction, and the padding rows."""
    padding = side.tensors.padded - side.architecture.vocab_size
    packed: TensorReader = other.megatron or MegatronView(other.tensors, other.architecture, padding)
    found = []
    for name in side.megatron.tensors:
        if side.megatron.tensors[name].shape != packed.tensors[name].shape and other.megatron is not None:
            continue  # two Megatron checkpoints may be padded differently; their vocabularies have been compared
        difference, _, _ = _compare(side.megatron, packed, name, False, progress)
        found += [f"{difference} (in Megatron's form)"] if difference else []
    return found


def _compare_with_record(side: Side, digests: dict[str, dict[str, str]], record: dict[str, str]) -> list[str]:
    """Against the digests that the conversion recorded when it wrote the folder: a shard replaced since then shows here."""
    return [
        f"{name}: is not what was written to {side.path} (its digest is another than {CONVERSION} says)"
        for name, texts in digests.items() if texts and name in record and record[name] not in texts.values()
    ]  # fmt: skip
