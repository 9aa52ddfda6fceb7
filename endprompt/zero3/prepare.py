"""Everything that can be known to be wrong before a weight is read: the checks of every start, and the whole of a dry run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from endprompt.data.samples import SampleDataset
from endprompt.data.tokenizers import load_tokenizer
from endprompt.errors import UserError
from endprompt.models.architectures import Architecture, resolve_architecture
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.positions import SampleBuilder, tokenize_prompts
from endprompt.recipe import Recipe
from endprompt.rope import RopeScaling, scaling_for
from endprompt.training.monitor import import_wandb
from endprompt.training.run_folder import RunFolder
from endprompt.zero3.checkpoints import check_disk, check_resumable, checkpoint_bytes, latest, missing_copies
from endprompt.zero3.config import micro_steps_per_step, offload_device, read_situation
from endprompt.zero3.load import check_weights


@dataclass(frozen=True)
class Prepared:
    """What the checks have read and found good."""

    config: dict  # the checkpoint's config.json
    architecture: Architecture
    rope: RopeScaling
    train_data: SampleDataset
    validation_data: SampleDataset | None
    situation: dict  # DeepSpeed settings file
    micro_steps: int
    data_fingerprint: str


def prepare(recipe: Recipe, world_size: int) -> Prepared:
    """Read and check the checkpoint's config and tensor headers, the tokenizer, the data and the batch split.

    Reads no weights, so it runs in seconds for any model, on a login node too. Raises UserError.
    """
    situation = read_situation(recipe)
    micro_steps = micro_steps_per_step(recipe, world_size)
    import_wandb(recipe)
    config = load_hf_config(recipe.model.path)
    architecture = resolve_architecture(recipe, config)
    rope = scaling_for(recipe, rope_of_config(config))
    check_weights(recipe.model.path, config)
    tokenizer = load_tokenizer(recipe.model.path)
    prompts = tokenize_prompts(recipe.positions, tokenizer)
    for prompt in prompts.prompts:
        if prompt.words.max() >= config["vocab_size"]:
            raise UserError(
                f"positions.prompts: {prompt.name}",
                f"holds token {prompt.words.max()}, the model's vocabulary has {config['vocab_size']}",
                f"write other words, or copy the model's own tokenizer to {recipe.model.path}",
            )
    builder = SampleBuilder(recipe.positions, recipe.target_length, prompts, recipe.seed)
    train_data = SampleDataset(recipe.data.train, builder, recipe.seed, vocab_size=config["vocab_size"])
    validation_data = None
    if recipe.data.validation:
        validation_data = SampleDataset(recipe.data.validation, builder, recipe.seed, vocab_size=config["vocab_size"])
    for dataset in filter(None, (train_data, validation_data)):
        dataset[0]  # most of what does not fit shows in the first sample
    return Prepared(config, architecture, rope, train_data, validation_data, situation, micro_steps, train_data.fingerprint())


def check_run_folder(recipe: Recipe, prepared: Prepared, folder: RunFolder) -> None:
    """The run folder can be written, is not stopped, has room, and holds no other run's checkpoint. Raises UserError."""
    folder.check_writable()
    folder.check_not_stopped()
    check_disk(folder, recipe, prepared.architecture.parameters, copies=missing_copies(folder, recipe))
    saved = latest(folder)
    if saved is not None:
        check_resumable(saved, recipe, prepared.data_fingerprint, folder)
    if folder.export.exists() and (saved is None or saved.step < recipe.steps):
        raise UserError(folder.export, "exists already, of another run", "move it away or set output.directory to a new folder")


def describe(recipe: Recipe, prepared: Prepared, folder: RunFolder, world_size: int) -> str:
    """The dry run's table: what would run, with the arithmetic."""
    training, positions = recipe.training, recipe.positions
    samples = recipe.steps * training.global_batch_size
    parameters = prepared.architecture.parameters
    states = describe_states(parameters, world_size, prepared.situation)
    per_epoch = prepared.train_data.samples_per_epoch
    saved = latest(folder) if folder.path.is_dir() else None
    rows = [
        ("recipe", f"{recipe.name}, fingerprint {recipe.fingerprint()}"),
        ("model", f"{recipe.model.path} ({parameters / 1e9:.2f} B parameters)"),
        ("window", f"{recipe.model.original_length} -> {recipe.target_length} ({recipe.rope.type}, s = {recipe.rope_factor:g})"),
        (
            "positions",
            f"{positions.scheme}, physical length {positions.physical_length}, displaced {positions.displaced_length or 'the prompt'}",
        ),
        (
            "batch",
            f"{training.global_batch_size} samples = {training.micro_batch_size} x {prepared.micro_steps} micro-steps x {world_size} ranks",
        ),
        ("steps", f"{recipe.steps} of {recipe.tokens_per_step:,} tokens = {recipe.steps * recipe.tokens_per_step:,} tokens"),
        (
            "data",
            f"{samples:,} samples = {samples / per_epoch:.2f} epochs of {per_epoch:,}",
        ),
        ("states", states),
        (
            "checkpoint",
            f"{checkpoint_bytes(recipe, parameters) / 1e9:.1f} GB each, {shutil.disk_usage(recipe_disk(folder)).free / 1e9:.0f} GB free",
        ),
        ("starts at", f"step {saved.step} (resumes {saved.path.name})" if saved else "step 0"),
    ]
    return "\n".join(f"{name:<11} {text}" for name, text in rows)


def describe_states(parameters: int, world_size: int, situation: dict) -> str:
    """Where the states lie, per rank in 10^9 bytes (deepspeed_configs/README.md has the arithmetic per parameter)."""
    share = parameters / world_size / 1e9
    if offload_device(situation, "offload_param") != "none":
        return f"{22 * share:.1f} GB a rank on the host, gathered layers on the device"
    if offload_device(situation, "offload_optimizer") != "none":
        return f"{2 * share:.1f} GB a rank on the device, {20 * share:.1f} GB on the host"
    return f"{18 * share:.1f} GB a rank on the device"


def recipe_disk(folder: RunFolder):
    """The nearest folder that exists on the run folder's path: its disk is the one that will be written."""
    path = folder.path.absolute()
    while not path.exists():
        path = path.parent
    return path
