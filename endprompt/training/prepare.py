"""What every engine reads and checks before a weight is read: the checks of every start, and most of a dry run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from endprompt.checkpoint.views import tensors_of_huggingface
from endprompt.checkpoint.weights import WeightFiles
from endprompt.data.samples import SampleDataset
from endprompt.data.tokenizers import load_tokenizer
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture, resolve_architecture
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.positions import SampleBuilder, tokenize_prompts
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, scaling_for
from endprompt.training.checkpoints import check_disk, check_resumable, checkpoint_bytes, latest, missing_copies
from endprompt.training.monitor import import_wandb
from endprompt.training.run_folder import RunFolder


@dataclass(frozen=True)
class Inputs:
    """What the checks have read and found good."""

    config: dict  # the checkpoint's config.json
    architecture: Architecture
    rope: RopeScaling
    train_data: SampleDataset
    validation_data: SampleDataset | None
    data_fingerprint: str


def read_inputs(recipe: Recipe) -> Inputs:
    """Read and check the checkpoint's config and tensor headers, the tokenizer and the data.

    Reads no weights, so it runs in seconds for any model, on a login node too. Raises UserError.
    """
    import_wandb(recipe)
    config = load_hf_config(recipe.model.path)
    architecture = resolve_architecture(recipe, config)
    rope = scaling_for(recipe, rope_of_config(config))
    check_weights(recipe.model.path, architecture)
    builder = sample_builder(recipe, config["vocab_size"])
    train_data = SampleDataset(recipe.data.train, builder, recipe.seed, vocab_size=config["vocab_size"])
    validation_data = None
    if recipe.data.validation:
        validation_data = SampleDataset(recipe.data.validation, builder, recipe.seed, vocab_size=config["vocab_size"])
    for dataset in filter(None, (train_data, validation_data)):
        dataset[0]  # most of what does not fit shows in the first sample
    return Inputs(config, architecture, rope, train_data, validation_data, train_data.fingerprint())


def sample_builder(recipe: Recipe, vocab_size: int) -> SampleBuilder:
    """The recipe's builder of samples, its prompts written with the checkpoint's own tokenizer. Raises UserError."""
    prompts = tokenize_prompts(recipe.positions, load_tokenizer(recipe.model.path))
    for prompt in prompts.prompts:
        if prompt.words.max() >= vocab_size:
            raise UserError(
                f"positions.prompts: {prompt.name}",
                f"holds token {prompt.words.max()}, the model's vocabulary has {vocab_size}",
                f"write other words, or copy the model's own tokenizer to {recipe.model.path}",
            )
    return SampleBuilder(recipe.positions, recipe.target_length, prompts, recipe.seed)


def check_weights(directory: str | Path, architecture: Architecture) -> None:
    """Hold the headers of a checkpoint's shards against its architecture. Raises UserError."""
    # Old conversions saved the rotary table, and some save the tied head twice.
    optional = {"lm_head.weight"} | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(architecture.layers)}
    WeightFiles(directory).check(tensors_of_huggingface(architecture), optional)


def check_run_folder(recipe: Recipe, inputs: Inputs, folder: RunFolder, engine: str) -> None:
    """The run folder can be written, is not stopped, has room, and holds no other run's checkpoint. Raises UserError."""
    folder.check_writable()
    folder.check_not_stopped()
    check_disk(folder, recipe, inputs.architecture.parameters, copies=missing_copies(folder, recipe))
    saved = latest(folder)
    if saved is not None:
        check_resumable(saved, recipe, inputs.data_fingerprint, engine)
    if folder.export.exists() and (saved is None or saved.step < recipe.steps):
        raise UserError(folder.export, "exists already, of another run", "move it away or set output.directory to a new folder")


def describe(recipe: Recipe, inputs: Inputs, folder: RunFolder, engine_rows: list[tuple[str, str]]) -> str:
    """The dry run's table: what would run, with the arithmetic. engine_rows: batch, states and what else the engine knows."""
    positions, training = recipe.positions, recipe.training
    samples, per_epoch = recipe.steps * training.global_batch_size, inputs.train_data.samples_per_epoch
    parameters = inputs.architecture.parameters
    saved = latest(folder) if folder.path.is_dir() else None
    displaced = positions.displaced_length or "the prompt"
    free = shutil.disk_usage(_existing(folder.path)).free
    rows = [
        ("recipe", f"{recipe.name}, fingerprint {recipe.fingerprint()}"),
        ("model", f"{recipe.model.path} ({parameters / 1e9:.2f} B parameters)"),
        ("window", f"{recipe.model.original_length} -> {recipe.target_length} ({recipe.rope.type}, s = {recipe.rope_factor:g})"),
        ("positions", f"{positions.scheme}, physical length {positions.physical_length}, displaced {displaced}"),
        ("steps", f"{recipe.steps} of {recipe.tokens_per_step:,} tokens = {recipe.steps * recipe.tokens_per_step:,} tokens"),
        ("data", f"{samples:,} samples = {samples / per_epoch:.2f} epochs of {per_epoch:,}"),
        *engine_rows,
        ("checkpoint", f"{checkpoint_bytes(recipe, parameters) / 1e9:.1f} GB each, {free / 1e9:.0f} GB free"),
        ("starts at", f"step {saved.step} (resumes {saved.path.name})" if saved else "step 0"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def _existing(path: Path) -> Path:
    """The nearest folder that exists on the path: its disk is the one that will be written."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
