"""A Hugging Face checkpoint held for evaluation: forward passes at any position ids, logits only where they are asked for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from endprompt.errors import UserError
from endprompt.evaluation.attention import IMPLEMENTATION
from endprompt.models.hf_config import load_hf_config, rope_of_config
from endprompt.rope import RopeScaling, attention_factor, inverse_frequencies

PREFILL_CHUNK = 1024
"""Tokens a forward pass takes at a time. Long enough for full-speed products, short enough that activations and the CPU's
T x S mask stay small: 1024 x 65536 booleans are 64 MiB."""

LOGIT_BYTES = 128 * 2**20
"""fp32 logits held at a time."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class CheckpointFacts:
    """What config.json says, read without loading weights.

    max_positions: `max_position_embeddings`. rope: the checkpoint's own scaling.
    """

    directory: Path
    max_positions: int
    rope: RopeScaling


def read_facts(directory: str | Path) -> CheckpointFacts:
    """Read and check config.json and the presence of weights. Raises UserError for a folder that cannot be evaluated."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(directory, "no such checkpoint folder", "give --model NAME=FOLDER")
    config = load_hf_config(directory)
    if not any(directory.glob("*.safetensors")):
        raise UserError(directory, "holds no *.safetensors file", "name a checkpoint folder with safetensors weights")
    return CheckpointFacts(directory, int(config["max_position_embeddings"]), rope_of_config(config))


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The folder's own tokenizer. Raises UserError when it is missing or gives no character offsets (a slow tokenizer)."""
    directory = Path(directory)
    if not (directory / "tokenizer.json").is_file():
        raise UserError(directory, "holds no tokenizer.json", "copy the base model's tokenizer files into the folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            directory / "tokenizer.json", f"cannot be read ({_first_line(error)})", "copy the base model's tokenizer files again"
        ) from None
    if not tokenizer.is_fast:
        raise UserError(directory, "its tokenizer gives no character offsets", "add a tokenizer.json that the tokenizers library reads")
    return tokenizer


class EvaluationModel:
    """A causal language model in eval mode whose attention is causal by physical index.

    Built by `load_model`. `hidden` and `stream` advance a transformers `DynamicCache`; `score` makes logits.
    """

    def __init__(self, model: PreTrainedModel, directory: str | Path):
        self.directory = directory
        self.decoder = model.get_decoder()
        # The products of the head decide arg-max and NLL: bf16 logits have steps of 0.06 at magnitude 16, so two tokens tie
        # often. An fp32 copy costs 4 V h bytes: 113 MB for SmolLM2-135M, 2.1 GB for Llama-3-8B.
        self.head = model.get_output_embeddings().weight.detach().float()
        self.device = self.head.device

    @torch.inference_mode()
    def hidden(self, tokens: torch.Tensor, position_ids: torch.Tensor, cache: DynamicCache | None = None) -> torch.Tensor:
        """Final normed states [batch, n, h] of tokens int64 [batch, n] at position_ids int64 [batch, n].

        With a cache the tokens follow it, physically, and are appended to it. One pass: for long inputs use `stream`.
        """
        output = self.decoder(
            input_ids=tokens.to(self.device), position_ids=position_ids.to(self.device), past_key_values=cache, use_cache=cache is not None
        )
        return output.last_hidden_state.to(self.device)

    def stream(self, tokens: torch.Tensor, position_ids: torch.Tensor, cache: DynamicCache) -> Iterator[tuple[int, torch.Tensor]]:
        """`hidden` in chunks of PREFILL_CHUNK tokens, appending to `cache`: yields (index of the chunk's first token, its states).

        Memory is bounded by the cache and one chunk's activations, whatever n is.
        """
        for start in range(0, tokens.shape[1], PREFILL_CHUNK):
            part = slice(start, start + PREFILL_CHUNK)
            yield start, self.hidden(tokens[:, part], position_ids[:, part], cache)

    def prefill(self, tokens: torch.Tensor, position_ids: torch.Tensor) -> DynamicCache:
        """The key/value cache of tokens int64 [batch, n] at position_ids int64 [batch, n]."""
        cache = DynamicCache()
        for _ in self.stream(tokens, position_ids, cache):
            pass
        return cache

    @torch.inference_mode()
    def score(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """NLL in nats, fp32 [n], of labels int64 [n] given states [n, h], and whether each is the arg-max, bool [n].

        Both on the CPU. Raises UserError when the model gives NaN or infinite losses.
        """
        labels = labels.to(self.device)
        nll = torch.empty(len(labels), dtype=torch.float32)
        correct = torch.empty(len(labels), dtype=torch.bool)
        chunk = max(1, LOGIT_BYTES // (4 * self.head.shape[0]))
        for start in range(0, len(labels), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part].to(self.head.dtype) @ self.head.t()
            nll[part] = torch.nn.functional.cross_entropy(logits, labels[part], reduction="none").cpu()
            correct[part] = (logits.argmax(dim=1) == labels[part]).cpu()
        if not nll.isfinite().all():
            raise UserError(self.directory, "the model gives NaN or infinite losses", "check the checkpoint; in bf16, try --dtype fp32")
        return nll, correct


def load_model(facts: CheckpointFacts, dtype: torch.dtype, device: str | torch.device, *, spread: bool = False) -> EvaluationModel:
    """Load the weights. Raises UserError for damaged or incomplete files and for a RoPE that transformers reads differently.

    spread: layers dealt out evenly over all GPUs (accelerate), for models that one cannot hold: 70B in bf16 is 141 GB.
    """
    directory = facts.directory
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            device_map="balanced" if spread else None,
            attn_implementation=IMPLEMENTATION,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(directory, f"cannot be loaded ({_first_line(error)})", "check that every file was copied whole") from None
    if report["missing_keys"]:  # transformers fills these with random numbers and only warns
        missing = sorted(report["missing_keys"])
        raise UserError(
            directory, f"{len(missing)} weights are missing, for instance {missing[0]}", "copy every safetensors file of the checkpoint"
        )
    rotary = model.get_decoder().rotary_emb
    same_table = rotary.inv_freq.dtype == torch.float32 and torch.allclose(
        rotary.inv_freq, inverse_frequencies(facts.rope), rtol=1e-5, atol=0
    )
    if not same_table or abs(rotary.attention_scaling - attention_factor(facts.rope)) > 1e-5:
        raise UserError(
            directory / "config.json",
            "this version of transformers reads another RoPE from it than it says",
            "write both rope_theta + rope_scaling and rope_parameters (endprompt/models/hf_config.py does), or use another transformers",
        )
    return EvaluationModel((model if spread else model.to(device)).eval(), directory)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
