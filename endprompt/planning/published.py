"""Published throughput of H100s (published_h100.csv): what time predictions are calibrated on and held against.

Each row names its source and its split. The split was fixed before the first fit: of every family a few sizes and lengths
calibrate, all others are held out. Rows are never moved afterwards, and no number is tuned on held-out rows; torchtitan's rows with
context parallelism came in after the fit, as held out.

LLaMA layers under FSDP got a family of their own because torchtitan's rows had been missed by 21 to 71 %: these have shaped the
model, if not its numbers. fms-fsdp's rows were named as its calibration beforehand (three of the six are from a table that was
replaced a day later; without them products and messages cannot be told apart), and one row of a 500 W card outside torchtitan's
tables as that of the card. The blind ones are AWS's, Accelerate's, Automodel's, Kempner's and torchao's. A row needs length, batch,
GPUs and recomputation from its source; a card or network that is inferred is marked in it. Left out are runs with an unknown share
of recomputed blocks (fms-fsdp with torch.compile) and on nodes of four GPUs.

Step times and TFLOPS are turned into tokens/s of a GPU: the batch over the time, and TFLOPS over the FLOPs a token by the source's
own formula, which counts the full square of attention in NeMo 24.03. That table leaves out its batch; 4,194,304 tokens a step are
assumed, as in NVIDIA's later table of the same series.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from endprompt.models.architectures import Architecture, get_architecture
from endprompt.rope import RopeScaling

TABLE = Path(__file__).with_name("published_h100.csv")
CALIBRATION, HELD_OUT = "calibration", "held_out"


@dataclass(frozen=True)
class Card:
    """hbm: bytes/s of its memory. All have the same multiprocessors; at 500 W they run slower."""

    hbm: float
    watts: int


CARDS = {  # "h100_500w": torchtitan's, 96 GB of HBM2e
    "h100": Card(3.35e12, 700),
    "h100_500w": Card(2.4e12, 500),
    "h200": Card(4.8e12, 700),
}


@dataclass(frozen=True)
class Row:
    """One published measurement. length and batches as in a recipe; throughput in tokens/s of one GPU."""

    id: str
    split: str
    family: str  # fsdp (PyTorch FSDP, LLaMA layers, FlashAttention 2), mpt (the same of 2023, FlashAttention 1) or megatron
    precision: str
    architecture: Architecture
    length: int
    gpus: int
    micro_batch: int
    global_batch: int
    tensor: int
    pipeline: int
    virtual: int
    context: int
    sharded: int  # GPUs that hold one copy of weights and states between them; all of them, or those of a node
    card: Card
    network: float  # Gb/s of one GPU between nodes
    gradient_bytes: int  # a gradient in messages
    layers: str  # how elementwise operations are run: eager, compiled, mpt, or fused (not counted)
    recompute: str  # none, half (torchtitan's every second product) or full
    attention: str  # the kernel: triton (FlashAttention 1) or flash (FlashAttention 2, cuDNN)
    tokens_per_second_per_gpu: float
    published_as: str
    source: str

    @property
    def micro_steps(self) -> int:
        return self.global_batch // (self.micro_batch * self.gpus // (self.tensor * self.pipeline * self.context))


def _mpt(name: str, layers: int, hidden: int, heads: int) -> Architecture:
    """MPT (mosaicml/llm-foundry): an MLP of two matrices of width 4h, that is a SwiGLU's three of width 8h/3; tied head."""
    return Architecture(name, layers, hidden, 8 * hidden / 3, heads, heads, hidden // heads, 50368, 2048, _ROPE, tied=True)


_ROPE = RopeScaling("none", 10000.0, 128)
_PEERS = {
    architecture.name: architecture
    for architecture in (
        _mpt("mpt_3b", 32, 2560, 20),
        _mpt("mpt_7b", 32, 4096, 32),
        _mpt("mpt_13b", 40, 5120, 40),
        _mpt("mpt_30b", 48, 7168, 56),
        _mpt("mpt_70b", 80, 8192, 64),
        # foundation-model-stack/fms-fsdp fms_fsdp/utils/config_utils.py
        Architecture("fms_34b", 48, 8192, 22016, 64, 8, 128, 32000, 4096, _ROPE),
        Architecture("llama31_405b", 126, 16384, 53248, 128, 8, 128, 128256, 131072, _ROPE),
        # NVIDIA's proxy of it for 32 GPUs: the same layers, but seven of them.
        Architecture("llama31_405b_7_layers", 7, 16384, 53248, 128, 8, 128, 128256, 131072, _ROPE),
    )
}


@cache
def rows() -> tuple[Row, ...]:
    with TABLE.open(newline="") as file:
        return tuple(_row(raw) for raw in csv.DictReader(file))


def _row(raw: dict[str, str]) -> Row:
    numbers = ("length", "gpus", "micro_batch", "global_batch", "tensor", "pipeline", "virtual", "context", "sharded", "gradient_bytes")
    name = raw["architecture"]
    return Row(
        **{
            **raw,
            **{field: int(raw[field]) for field in numbers},
            "architecture": _PEERS.get(name) or get_architecture(name),
            "card": CARDS[raw["card"]],
            "network": float(raw["network"]),
            "tokens_per_second_per_gpu": float(raw["tokens_per_second_per_gpu"]),
        }
    )
