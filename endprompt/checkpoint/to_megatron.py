"""Hugging Face safetensors to a Megatron-Core torch_dist checkpoint that loads at any parallel layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endprompt.checkpoint.companions import copy_tokenizer
from endprompt.checkpoint.conversion import Conversion, Files, Task
from endprompt.checkpoint.digests import ALGORITHM, Digest
from endprompt.checkpoint.layout_record import record_layout
from endprompt.checkpoint.locate import TRACKER
from endprompt.checkpoint.mapping import huggingface_names, row_of, source_runs
from endprompt.checkpoint.megatron_metadata import write_model_facts
from endprompt.checkpoint.provenance import record_conversion, source_identity
from endprompt.checkpoint.safetensors_files import SafetensorsFolder, TensorInfo, check_tensors
from endprompt.checkpoint.torch_dist_writer import Blob, plan_blobs, write_description
from endprompt.checkpoint.views import MegatronView, block_buffer, row_blocks, tensors_of_huggingface
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture, architecture_of_config
from endprompt.models.hf_config import load_hf_config

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
COMPANIONS = "huggingface"
"""Folder in the checkpoint that keeps config.json, tokenizer and generation config, so that it can go back on its own."""


_MEGATRON_LM = {"checkpoint_version": 3.0, "iteration": 0}
"""What Megatron-LM wants in common.pt: below version 2 it would reorder the rows of linear_qkv once more."""


def plan_to_megatron(source: Path, target: Path, *, vocabulary_multiple: int = 1, megatron_lm: bool = False) -> Conversion:
    """Check `source` and lay out `target`; nothing is written yet.

    vocabulary_multiple: the vocabulary is padded with zero rows to a multiple of this (Megatron pads by itself on loading,
    so 1 serves). megatron_lm: the checkpoint goes into target/release, with the tracker that Megatron-LM's --load looks for;
    else `target` is what dist_checkpointing.load reads into a GPTModel. Raises UserError for a source that is not a complete,
    unquantised LLaMA or Mistral checkpoint.
    """
    if vocabulary_multiple < 1:
        raise UserError(f"--vocab-multiple {vocabulary_multiple}", "is below 1", "give a positive number or leave it out")
    config = load_hf_config(source)
    architecture = architecture_of_config(config)
    reader = SafetensorsFolder(source)
    optional = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(architecture.layers)}
    if architecture.tied:
        optional.add(HEAD)
    check_tensors(reader.tensors, tensors_of_huggingface(architecture), optional, source)
    if architecture.tied and HEAD in reader.tensors:
        _check_tied(reader, source)
    padding = -architecture.vocab_size % vocabulary_multiple
    view = MegatronView(reader, architecture, padding)
    blobs = plan_blobs(view.tensors)
    by_name: dict[str, list[Blob]] = {}
    for blob in blobs:
        by_name.setdefault(blob.name, []).append(blob)
    tasks = [Task(name, info.bytes, _writer(view, architecture, name, by_name[name])) for name, info in view.tensors.items()]

    def finish(top: Path, done: dict[str, dict]) -> None:
        folder = top / "release" if megatron_lm else top
        digests = {name: digest for facts in done.values() for name, digest in facts["digests"].items()}
        write_description(folder, view.tensors, blobs, architecture.layers, _MEGATRON_LM if megatron_lm else {})
        rows = architecture.vocab_size + padding
        write_model_facts(folder, None, architecture, config, architecture.rope, source=source, padded_vocab_size=rows)
        record_layout(folder, reader)
        shown = {name: reader.tensors[name] for name in digests}
        record_conversion(folder, "huggingface to megatron", source, shown, digests)
        (folder / COMPANIONS).mkdir(exist_ok=True)
        shutil.copyfile(source / "config.json", folder / COMPANIONS / "config.json")
        copy_tokenizer(source, folder / COMPANIONS, None)
        if megatron_lm:
            (top / TRACKER).write_text("release\n")

    files = source_identity(source, ["config.json", *sorted(reader.files)])
    identity = {
        "to": "megatron", "source": files, "vocabulary_multiple": vocabulary_multiple, "megatron_lm": megatron_lm, "digests": ALGORITHM,
    }  # fmt: skip
    return Conversion(target, identity, tasks, finish, subfolder="release" if megatron_lm else "")


def _writer(view: MegatronView, architecture: Architecture, name: str, blobs: list[Blob]) -> Callable[[Files], dict[str, Any]]:
    """Work of one parameter: its chunks in order, and the digest of each Hugging Face tensor in it on the way."""
    info = view.tensors[name]
    row, layer = row_of(name)
    sources = huggingface_names(row, layer)

    def work(files: Files) -> dict[str, Any]:
        hashes = [Digest() for _ in sources]
        buffer = block_buffer(info)
        for blob in blobs:
            for start, stop in row_blocks(TensorInfo((blob.stop - blob.start, *info.shape[1:]), info.dtype)):
                block = buffer[: (stop - start) * info.row_bytes]
                view.read(name, blob.start + start, blob.start + stop, block)
                files.write(blob.file, blob.offset + blob.archive.data_start + start * info.row_bytes, block)
                _hash_rows(block, blob.start + start, blob.start + stop, hashes)
                files.progress(len(block))
            files.write(blob.file, blob.offset, blob.archive.head())
            files.write(blob.file, blob.offset + blob.length - len(blob.archive.tail()), blob.archive.tail())
        return {"digests": {source: digest.text() for source, digest in zip(sources, hashes, strict=True)}}

    def _hash_rows(block: memoryview, start: int, stop: int, hashes: list) -> None:
        end, at = min(stop, architecture.vocab_size) if row.vocabulary else stop, 0
        for index, _, count in source_runs(row.layout, architecture, start, end):
            hashes[index].update(block[at : at + count * info.row_bytes])
            at += count * info.row_bytes

    return work


def _check_tied(reader: SafetensorsFolder, source: Path) -> None:
    """An output head in the files of a model that ties it must equal the embedding: Megatron keeps one of them."""
    info = reader.tensors[EMBEDDING]
    same = reader.tensors[HEAD] == info
    for start, stop in row_blocks(info) if same else ():
        pair = [memoryview(bytearray((stop - start) * info.row_bytes)) for _ in range(2)]
        for name, block in zip((EMBEDDING, HEAD), pair, strict=True):
            reader.read(name, start, stop, block)
        same = same and pair[0] == pair[1]
    if not same:
        problem = f"{HEAD} differs from {EMBEDDING}, but config.json ties them"
        raise UserError(source, problem, "set tie_word_embeddings as the model was trained")
