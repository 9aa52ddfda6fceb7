"""What a recipe says. One YAML file holds every fact of a run; scripts and engine configurations derive from it.

Unknown fields are errors, so a misspelt knob never passes silently. Lengths are in tokens.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]

SchemeName = Literal["endprompt", "endprompt_random", "pose", "endprompt_pose", "cream", "randpos", "short", "full"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    """The checkpoint that is extended."""

    path: str = Field(min_length=1, description="folder of a Hugging Face checkpoint (config.json, *.safetensors)")
    architecture: str = Field(description="a name in endprompt/models/architectures.py, held against config.json")
    original_length: PositiveInt = Field(description="window that the checkpoint was pre-trained with")


class Rope(Section):
    """How positions become rotary phases; the formulae are in endprompt/rope.py."""

    type: Literal["none", "linear", "ntk", "yarn", "llama3"] = "linear"
    factor: PositiveFloat | None = Field(None, description="s; target_length / original_length when left out")
    theta: PositiveFloat | None = Field(None, description="base; the checkpoint's own when left out")
    original_length: PositiveInt | None = Field(
        None, description="O of yarn and llama3; model.original_length when left out (8192 for Llama-3.1)"
    )
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    attention_factor: PositiveFloat | None = Field(None, description="yarn; 0.1 ln(s) + 1 when left out")
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    interpolation: PositiveFloat = Field(1.0, description="llama3: a further linear interpolation of every frequency")

    @model_validator(mode="after")
    def _combinations(self) -> Rope:
        if self.interpolation != 1.0 and self.type != "llama3":
            raise ValueError("interpolation goes with type llama3; use type linear with factor for plain interpolation")
        if self.type == "none" and self.factor not in (None, 1.0):
            raise ValueError("type none takes no factor; choose linear, ntk, yarn or llama3")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("high_freq_factor must be above low_freq_factor")
        if self.beta_fast <= self.beta_slow:
            raise ValueError("beta_fast must be above beta_slow")
        return self


class TextPrompt(Section):
    """A terminal prompt with fixed words. EP_1, EP_2 and EP_3 of the paper are built in by name."""

    name: str = Field(min_length=1)
    text: str = Field(min_length=1)
    weight: PositiveFloat = Field(1.0, description="how often it is drawn, relative to the others")


class RecallPrompt(Section):
    """A terminal prompt that quotes the body: `spans` times the cue followed by a verbatim span of the body.

    Ours, not the paper's: the far positions then carry something that only attention to the body can predict.
    """

    name: str = Field("recall", min_length=1)
    cue: str = Field("\n\nFrom the text above:", min_length=1)
    span_length: PositiveInt
    spans: PositiveInt = 1
    weight: PositiveFloat = 1.0


class PoseOptions(Section):
    """PoSE (dwzhu-pku/PoSE). Read by schemes `pose` and `endprompt_pose` (switch A)."""

    chunks: Annotated[int, Field(ge=2)] = 2
    first_chunk: Literal["half", "any"] = Field("half", description="half: released code, r1 <= (n+1)//2; any: the paper")
    content: Literal["uniform", "contiguous"] = Field(
        "uniform", description="uniform: later chunks skip text too (v ~ U); contiguous: only positions skip (v = 0)"
    )
    source_factor: Annotated[int, Field(ge=1)] = Field(5, description="text read per sample, in physical lengths")


class EndPromptPoseOptions(Section):
    """ET(PoSE): the paper gives no code; spec section 2 names three readings."""

    variant: Literal["A", "B", "C"] = "A"
    pieces: PositiveInt = Field(2, description="variant C: pieces the prompt is cut into")


class CreamOptions(Section):
    """CREAM (bigai-nlco/CREAM)."""

    sigma: PositiveFloat = 3.0


class Positions(Section):
    """Which position scheme turns text into samples, and its knobs."""

    scheme: SchemeName = "endprompt"
    physical_length: Annotated[int, Field(ge=8)] = Field(description="tokens that a sample really holds")
    prompts: list[TextPrompt | RecallPrompt] = Field(default_factory=lambda: resolve_prompts(["EP_1"]), min_length=1)
    displaced_length: PositiveInt | None = Field(
        None, description="tokens given far positions; the drawn prompt's own length when left out (eq. 4-5)"
    )
    prompt_loss_weight: NonNegativeFloat = Field(1.0, description="weight of predicting a prompt token; body tokens have 1")
    pose: PoseOptions = PoseOptions()
    endprompt_pose: EndPromptPoseOptions = EndPromptPoseOptions()
    cream: CreamOptions = CreamOptions()

    @field_validator("prompts", mode="before")
    @classmethod
    def _names(cls, value):
        return resolve_prompts(value) if isinstance(value, list) else value


BUILT_IN_PROMPTS = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}
"""The three terminal prompts of the paper (its section 4.5)."""


def resolve_prompts(prompts: list) -> list:
    """Replace built-in names by their prompts; a mapping passes through for pydantic to check."""
    resolved = []
    for prompt in prompts:
        if isinstance(prompt, str):
            if prompt not in BUILT_IN_PROMPTS:
                known = ", ".join(BUILT_IN_PROMPTS)
                raise ValueError(f"unknown prompt {prompt!r}; use {known}, a mapping with name and text, or one with span_length")
            prompt = TextPrompt(name=prompt, text=BUILT_IN_PROMPTS[prompt])
        elif isinstance(prompt, dict):
            if not prompt.keys() & {"text", "span_length"}:
                raise ValueError(f"{prompt} is neither a text nor a recall prompt; give it text, or span_length")
            prompt = (TextPrompt if "text" in prompt else RecallPrompt)(**prompt)
        resolved.append(prompt)
    return resolved


class Source(Section):
    """One indexed dataset of a blend: `path`.bin and `path`.idx."""

    path: str = Field(min_length=1)
    weight: PositiveFloat = 1.0


class Data(Section):
    train: list[Source] = Field(min_length=1)
    validation: list[Source] = []
    validation_samples: PositiveInt = 64


class Training(Section):
    """Budget and optimizer. Exactly one of `tokens` and `steps` says how long."""

    tokens: PositiveInt | None = None
    steps: PositiveInt | None = None
    global_batch_size: PositiveInt = Field(description="samples a step, over all ranks and micro-batches")
    micro_batch_size: PositiveInt = 1
    learning_rate: PositiveFloat
    schedule: Literal["constant_with_warmup", "cosine"] = "constant_with_warmup"
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    min_learning_rate: NonNegativeFloat = Field(0.0, description="where cosine ends")
    weight_decay: NonNegativeFloat = 0.0
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: PositiveFloat = 1e-8
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm; 0 switches clipping off")
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: bool = True

    @model_validator(mode="after")
    def _budget(self) -> Training:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give exactly one of tokens and steps")
        return self


class DeepSpeed(Section):
    config: str = Field("deepspeed_configs/zero3.json", description="ZeRO settings; nothing that a recipe also says")


class Megatron(Section):
    """Parallel layout and kernels of the Megatron-Core engine; nothing of it changes what is trained.

    A run resumes at any other layout; distributed_optimizer alone must stay as it was (its states are named otherwise).

    Ranks = tensor_parallel x pipeline_parallel x context_parallel x data parallel, which is what is left of them.
    """

    tensor_parallel: PositiveInt = Field(1, description="TP: cuts heads, feed-forward width and vocabulary; within a node")
    pipeline_parallel: PositiveInt = Field(1, description="PP: stages of layers")
    virtual_pipeline: PositiveInt = Field(1, description="VPP: chunks of layers a stage holds, interleaved; needs pipeline_parallel > 1")
    context_parallel: PositiveInt = Field(1, description="CP: cuts every sequence into 2 x CP chunks, dealt out zig-zag")
    sequence_parallel: bool = Field(True, description="SP: norms and dropout on a share of the tokens; counts where tensor_parallel > 1")
    recompute: Literal["full", "selective", "none"] = Field(
        "full",
        description="what training.activation_checkpointing recomputes under Megatron-Core: whole layers, the attention core (which saves "
        "memory only where attention keeps its scores: neither flash attention nor scaled_dot_product_attention does), or nothing",
    )
    distributed_optimizer: bool = Field(True, description="optimizer states cut over data-parallel ranks (ZeRO-1)")
    overlap: bool = Field(True, description="reduce gradients and gather parameters while computing (with distributed_optimizer)")
    transformer: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="layer kernels; auto: Transformer Engine where it is installed and a GPU is there, else local"
    )
    rope_fusion: bool = Field(False, description="Transformer Engine's fused rotary kernel; one table for all samples only")
    async_save: bool = Field(False, description="write checkpoints in the background while training goes on")


class Wandb(Section):
    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "endprompt"
    entity: str | None = None


class Output(Section):
    directory: str = Field(min_length=1, description="run folder: checkpoints, log, status, export")
    save_interval: PositiveInt = Field(200, description="steps between checkpoints")
    keep_last: PositiveInt = 2
    validation_interval: PositiveInt = Field(200, description="steps between validation losses")
    log_interval: PositiveInt = 1
    export_dtype: Literal["bf16", "fp32"] = "bf16"
    export_shard_gb: PositiveFloat = Field(5.0, description="largest safetensors shard, in units of 10^9 bytes")


class Recipe(Section):
    """A run. `load_recipe` builds it from YAML and reports errors by file and field."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    seed: Annotated[int, Field(ge=0)] = 42
    model: Model
    target_length: Annotated[int, Field(gt=0, le=2**24, description="positions are made in fp32, which counts exactly so far")]
    rope: Rope = Rope()
    positions: Positions
    data: Data
    training: Training
    deepspeed: DeepSpeed = DeepSpeed()
    megatron: Megatron = Megatron()
    wandb: Wandb = Wandb()
    output: Output

    @model_validator(mode="after")
    def _lengths(self) -> Recipe:
        from endprompt.recipe.checks import check_lengths

        check_lengths(self)
        return self

    @property
    def megatron_recompute(self) -> Literal["full", "selective", "none"]:
        """What the Megatron-Core engine recomputes."""
        return self.megatron.recompute if self.training.activation_checkpointing else "none"

    @property
    def rope_factor(self) -> float:
        """s = target / original (paper section 3.3) unless the recipe sets it."""
        if self.rope.type == "none":
            return 1.0
        return self.rope.factor or max(1.0, self.target_length / self.model.original_length)

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.positions.physical_length

    @property
    def steps(self) -> int:
        """Whole optimizer steps that fit the token budget."""
        return self.training.steps or self.training.tokens // self.tokens_per_step

    def fingerprint(self) -> str:
        """Hash of all that decides the numbers of a run: equal fingerprints may resume each other's checkpoints."""
        facts = deciding_facts(self.model_dump(mode="json"))
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def deciding_facts(dump: dict) -> dict[str, object]:
    """The fields of a dumped recipe that decide a run's numbers, flat: {"training.learning_rate": 2e-5, ...}.

    Left out: where things lie and how often they are reported, validation, the engine's layout and the micro-batch
    (they change only rounding). The data's content is held separately (`SampleDataset.fingerprint`).
    """
    decides = {key: value for key, value in dump.items() if key not in ("name", "wandb", "output", "deepspeed", "megatron", "data")}
    decides["data"] = {"train_weights": [source["weight"] for source in dump["data"]["train"]]}
    flat = dict(_flatten(decides))
    for field in ("model.path", "training.micro_batch_size", "training.activation_checkpointing"):
        flat.pop(field, None)
    return flat


def _flatten(value: dict, prefix: str = ""):
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flatten(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner
