"""A torch_dist checkpoint, of this project or of Megatron-LM, to a Hugging Face folder in sharded safetensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endprompt.checkpoint.companions import DTYPE_NAMES, copy_tokenizer, read_tokenizer_settings, set_dtype, write_companions
from endprompt.checkpoint.conversion import Conversion, Files, Task
from endprompt.checkpoint.digests import ALGORITHM, Digest
from endprompt.checkpoint.layout_record import Shard, fitting, layout_of, new_layout, recorded_layout, write_index
from endprompt.checkpoint.locate import find_checkpoint
from endprompt.checkpoint.megatron_metadata import ModelFacts, read_model_facts
from endprompt.checkpoint.provenance import file_sha256, record_conversion, source_identity
from endprompt.checkpoint.safetensors_files import SafetensorsFolder, TensorInfo, make_header
from endprompt.checkpoint.to_megatron import COMPANIONS, EMBEDDING, HEAD
from endprompt.checkpoint.torch_dist import TorchDistCheckpoint
from endprompt.checkpoint.views import CastView, HuggingFaceView, TensorReader, block_buffer, row_blocks
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture, architecture_of_config, resolve_architecture
from endprompt.models.hf_config import check_hf_config, extended_config, load_hf_config, rope_of_config
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, scaling_for

_SAFETENSORS_DTYPES = {"bf16": "BF16", "fp32": "F32", "fp16": "F16"}
DEFAULT_SHARD_GB = 5.0


@dataclass(frozen=True)
class Model:
    """Everything about the exported model but its numbers.

    config: config.json of the source. companions: folder with its tokenizer. recipe: what it was trained with, or None.
    rope, target_length: of the export. dtype: bf16, fp32 or None for each tensor's own.
    """

    architecture: Architecture
    config: dict[str, Any]
    companions: Path
    recipe: Recipe | None
    rope: RopeScaling
    dtype: str | None

    def exported_config(self) -> dict[str, Any]:
        config = extended_config(self.config, self.rope, self.recipe.target_length) if self.recipe else dict(self.config)
        if self.dtype:
            set_dtype(config, self.dtype)
        return config


def describe_model(folder: Path, hf_config: Path | None, recipe: Recipe | None, dtype: str | None) -> Model:
    """From the facts beside the checkpoint, or from the user's --hf-config and --recipe. Raises UserError where they disagree."""
    facts = read_model_facts(folder)
    if facts is None:
        if hf_config is None:
            fix = "pass --hf-config with the original Hugging Face checkpoint (and --recipe with what it was trained with)"
            raise UserError(folder, "does not say which model it is (no endprompt_model.json)", fix)
        config = load_hf_config(hf_config)
        if recipe is None:
            return Model(architecture_of_config(config), config, hf_config, None, rope_of_config(config), dtype)
        architecture, rope = resolve_architecture(recipe, config), scaling_for(recipe, rope_of_config(config))
        return Model(architecture, config, hf_config, recipe, rope, dtype or recipe.output.export_dtype)
    if recipe is not None:
        raise UserError("--recipe", f"{folder} says itself what it was trained with", "leave --recipe out")
    check_hf_config(facts.hf_config, f"{folder}/endprompt_model.json: hf_config")
    if hf_config is not None:
        _check_same(facts, load_hf_config(hf_config), hf_config)
    places = [hf_config] if hf_config else [folder / COMPANIONS, Path(facts.source)]
    companions = next((place for place in places if (place / "config.json").is_file()), None)
    if companions is None:
        raise UserError(facts.source, "the source checkpoint is not there any more", "pass --hf-config with a copy, for its tokenizer")
    trained = Recipe.model_validate(facts.recipe) if facts.recipe else None
    return Model(facts.architecture, facts.hf_config, companions, trained, facts.rope, dtype or facts.dtype)


def _check_same(facts: ModelFacts, config: dict[str, Any], where: Path) -> None:
    mine, theirs = architecture_of_config(facts.hf_config), architecture_of_config(config)
    if mine != theirs:
        different = [name for name in vars(mine) if getattr(mine, name) != getattr(theirs, name)]
        name = different[0]
        problem = f"{name} is {getattr(theirs, name)}, the checkpoint was made from {getattr(mine, name)}"
        raise UserError(f"{where}/config.json", problem, "give the checkpoint it was made from or leave --hf-config out")


def plan_to_huggingface(
    source: Path,
    target: Path,
    *,
    step: int | None = None,
    hf_config: Path | None = None,
    recipe: Recipe | None = None,
    dtype: str | None = None,
    shard_gb: float | None = None,
) -> Conversion:
    """Find and check the checkpoint, and lay out `target`; nothing is written yet.

    dtype: bf16 or fp32 to cast to; the recipe's export_dtype when left out, and each tensor's own where nothing was trained.
    shard_gb: largest shard in 10^9 bytes; when left out, the shards of the source checkpoint where they fit.
    """
    if shard_gb is not None and not shard_gb > 0:
        raise UserError(f"--shard-gb {shard_gb:g}", "must be above 0", "give a size in 10^9 bytes or leave it out")
    folder, found_step = find_checkpoint(source, step)
    model = describe_model(folder, hf_config, recipe, dtype)
    if (model.companions / "tokenizer_config.json").is_file():
        read_tokenizer_settings(model.companions)
    checkpoint = TorchDistCheckpoint(folder)
    checkpoint.check_blobs()
    view: TensorReader = HuggingFaceView(checkpoint, model.architecture, folder)
    if model.dtype:
        view = CastView(view, _SAFETENSORS_DTYPES[model.dtype])
    shards = _shards(view.tensors, model, folder, shard_gb)
    tasks = _tasks(view, shards)

    def finish(partial: Path, done: dict[str, dict]) -> None:
        digests = {name: facts["digest"] for name, facts in done.items() if "digest" in facts}
        write_index(partial, shards, _with_head(view.tensors))
        shown = {name: _with_head(view.tensors)[name] for name in digests}
        facts = {"step": found_step, "metadata_sha256": file_sha256(folder / ".metadata")}
        digest = record_conversion(partial, "megatron to huggingface", folder, shown, digests, **facts)
        _write_rest(partial, model, found_step, {"Weights": f"{digest} (names, dtypes, shapes and numbers)", **_origin(folder)})

    files = sorted(path.name for path in folder.glob("*.distcp")) + [".metadata"]
    identity = {
        "to": "huggingface", "source": source_identity(folder, files), "dtype": model.dtype, "config": model.exported_config(),
        "shards": [vars(shard) for shard in shards], "digests": ALGORITHM,
    }  # fmt: skip
    return Conversion(target, identity, tasks, finish)


def _with_head(tensors: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """With the output head that files of a tied model may repeat."""
    return {**tensors, HEAD: tensors.get(HEAD, tensors[EMBEDDING])}


def _shards(tensors: dict[str, TensorInfo], model: Model, folder: Path, shard_gb: float | None) -> list[Shard]:
    if shard_gb is not None:
        return new_layout(tensors, shard_gb * 1e9)
    also = HEAD if model.architecture.tied else None
    known = fitting(recorded_layout(folder), tensors, also)
    if known is None and model.companions != folder / COMPANIONS:
        try:
            reader = SafetensorsFolder(model.companions)
        except UserError:
            pass  # only config and tokenizer are there, which is enough
        else:
            known = fitting(layout_of(reader), tensors, also)
            reader.close()
    limit = model.recipe.output.export_shard_gb if model.recipe else DEFAULT_SHARD_GB
    return known or new_layout(tensors, limit * 1e9)


def _tasks(view: TensorReader, shards: list[Shard]) -> list[Task]:
    tensors, tasks = _with_head(view.tensors), []
    for shard in shards:
        header, starts = make_header({name: tensors[name] for name in shard.names}, shard.metadata, shard.header)
        tasks.append(Task(f"header of {shard.file}", 0, _header_writer(shard.file, header)))
        for name in shard.names:
            read_as = name if name in view.tensors else EMBEDDING
            tasks.append(Task(name, tensors[name].bytes, _writer(view, read_as, shard.file, starts[name])))
    return tasks


def _header_writer(file: str, header: bytes) -> Callable[[Files], dict[str, Any]]:
    def work(files: Files) -> dict[str, Any]:
        files.write(file, 0, header)
        return {}

    return work


def _writer(view: TensorReader, name: str, file: str, offset: int) -> Callable[[Files], dict[str, Any]]:
    info = view.tensors[name]

    def work(files: Files) -> dict[str, Any]:
        digest, buffer = Digest(), block_buffer(info)
        for start, stop in row_blocks(info):
            block = buffer[: (stop - start) * info.row_bytes]
            view.read(name, start, stop, block)
            files.write(file, offset + start * info.row_bytes, block)
            digest.update(block)
            files.progress(len(block))
        return {"digest": digest.text()}

    return work


def _origin(folder: Path) -> dict[str, str]:
    facts = read_model_facts(folder)
    hashes = facts.source_hashes if facts else {}
    lines = {"Made from": f"`{folder.name}`, whose .metadata has sha256 {file_sha256(folder / '.metadata')}"}
    if "config.json" in hashes:
        lines["Base model's config.json"] = f"sha256 {hashes['config.json']}"
    return lines


def _write_rest(partial: Path, model: Model, step: int | None, provenance: dict[str, str]) -> None:
    if model.recipe is not None:
        write_companions(
            partial, model.recipe, model.config, model.rope, dtype=model.dtype, step=step, source=model.companions, provenance=provenance
        )
        return
    same = json.loads((model.companions / "config.json").read_text(encoding="utf-8")) == model.exported_config()
    if same:
        shutil.copyfile(model.companions / "config.json", partial / "config.json")
    else:
        (partial / "config.json").write_text(json.dumps(model.exported_config(), indent=2) + "\n")
    copy_tokenizer(model.companions, partial, None)
    trained = f" of step {step}" if step else ""
    lines = "".join(f"- {name}: {value}\n" for name, value in provenance.items())
    dtype = f", cast to {DTYPE_NAMES[model.dtype]}" if model.dtype else ""
    (partial / "README.md").write_text(
        f"---\nlibrary_name: transformers\n---\n\nWeights{trained} from a Megatron-Core checkpoint{dtype}. RoPE and window are those of "
        f"the config.json that was given.\n\n{lines}"
    )
