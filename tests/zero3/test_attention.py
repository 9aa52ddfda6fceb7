"""The packed-sequence trap: attention must be causal by physical index in the very mode that training uses."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from endprompt.positions import Sample
from endprompt.training.probing import ProbeFailed
from endprompt.training.world import World
from endprompt.zero3 import attention
from endprompt.zero3.model import CausalLMForWeightedLoss
from endprompt.zero3.probe import probe
from tests.support.recipes import make_recipe

TOKENS, TARGET = 24, 1024
POSITIONS = {
    "ordinary": list(range(TOKENS)),
    "endprompt": [*range(18), *range(TARGET - 6, TARGET)],
    "pose": [*range(10), *range(300, 300 + TOKENS - 10)],
    "random": sorted(torch.randperm(TARGET, generator=torch.Generator().manual_seed(5))[:TOKENS].tolist()),
}


def make_model(implementation: str, *, checkpointing: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=TARGET, initializer_range=0.3, attn_implementation=implementation,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def by_hand(model: LlamaForCausalLM, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [n, V] of a LLaMA written out: no transformers attention, rotary or mask code."""
    config, n = model.config, len(tokens)
    dim = config.hidden_size // config.num_attention_heads
    angles = positions[:, None] * 10000.0 ** (-torch.arange(0, dim, 2) / dim)

    def rms(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x):  # [heads, n, dim]: pair j with j + dim/2
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)

    x = model.model.embed_tokens.weight[tokens]
    for layer in model.model.layers:
        h, attn = rms(x, layer.input_layernorm.weight), layer.self_attn
        q, k, v = ((h @ p.weight.t()).view(n, -1, dim).transpose(0, 1) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        k, v = (t.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for t in (rotate(k), v))
        scores = rotate(q) @ k.transpose(1, 2) / dim**0.5
        visible = torch.ones(n, n, dtype=torch.bool).tril()  # by physical index
        mixed = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).reshape(n, -1) @ attn.o_proj.weight.t()
        h = rms(x, layer.post_attention_layernorm.weight)
        x = x + (F.silu(h @ layer.mlp.gate_proj.weight.t()) * (h @ layer.mlp.up_proj.weight.t())) @ layer.mlp.down_proj.weight.t()
    return rms(x, model.model.norm.weight) @ model.lm_head.weight.t()


def error_of(implementation: str, scheme: str, checkpointing: bool = True) -> tuple[float, float]:
    """(largest logit error, relative gradient error of the first layer's q_proj) against the hand-written model."""
    model = make_model(implementation, checkpointing=checkpointing)
    tokens, positions = torch.arange(TOKENS) * 7 % 97, torch.tensor(POSITIONS[scheme])
    logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False).logits[0]
    expected = by_hand(model, tokens, positions)
    weight = model.model.layers[0].self_attn.q_proj.weight
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (mine,) = torch.autograd.grad((logits * direction).sum(), weight)
    (theirs,) = torch.autograd.grad((expected * direction).sum(), weight)
    return (logits - expected).abs().max().item(), ((mine - theirs).norm() / theirs.norm()).item()


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("scheme", POSITIONS)
def test_sdpa_equals_attention_by_hand_in_training(scheme, checkpointing):
    logits, gradient = error_of(attention.SDPA, scheme, checkpointing)
    assert logits < 1e-4 and gradient < 1e-4


@pytest.mark.parametrize("scheme", ["endprompt", "pose", "random"])
def test_the_trap_is_there_with_stock_sdpa(scheme):
    """If this fails, transformers has changed, and the test above may pass for another reason."""
    logits, gradient = error_of("sdpa", scheme)
    assert logits > 0.1 and gradient > 0.1


class StandInKernels(types.ModuleType):
    """flash_attn on a CPU: dense and variable-length kernels by definition, and a record of which was called."""

    __version__ = "2.8.3"

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def flash_attn_func(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
        self.calls.append(("dense", causal))
        groups = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale, is_causal=causal).transpose(1, 2)

    def flash_attn_varlen_func(self, *_, **__):
        self.calls.append(("varlen", None))
        raise AssertionError("the variable-length kernel cuts samples at jumps")


@pytest.fixture
def flash_attn(monkeypatch):
    module = StandInKernels()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.mark.parametrize("scheme", POSITIONS)
def test_flash_dispatch_is_dense_and_causal(scheme, flash_attn):
    logits, gradient = error_of(attention.FLASH, scheme)
    assert logits < 1e-4 and gradient < 1e-4
    assert set(flash_attn.calls) == {("dense", True)}


def test_stock_flash_dispatch_takes_jumps_for_documents():
    """transformers decides between the kernels from the ids alone: what our dispatch must never do."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    falling = torch.tensor([[*range(12), *range(12)]])
    assert _is_packed_sequence(falling, batch_size=1)


def test_masks_are_refused():
    query = torch.zeros(1, 4, 8, 8)
    for function in (attention.physical_sdpa, attention.physical_flash):
        with pytest.raises(ValueError, match="mask"):
            function(None, query, query, query, torch.zeros(1, 1, 8, 8))


def test_choice_of_implementation(flash_attn, monkeypatch):
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: object())
    assert attention.choose_attention(torch.device("cuda"), "bf16") == attention.FLASH
    assert attention.choose_attention(torch.device("cuda"), "fp32") == attention.SDPA
    assert attention.choose_attention(torch.device("cpu"), "bf16") == attention.SDPA


def run_probe(model, scheme="endprompt") -> None:
    tokens = torch.arange(TOKENS) * 7 % 97
    sample = Sample(tokens.numpy(), torch.tensor(POSITIONS[scheme]).numpy(), torch.ones(TOKENS).numpy())
    probe(CausalLMForWeightedLoss(model), sample, make_recipe(target_length=TARGET), 97, World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", POSITIONS)
def test_probe_passes_on_what_training_uses(scheme, dtype):
    run_probe(make_model(attention.SDPA, checkpointing=True).to(dtype), scheme)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_probe_fires_on_stock_attention(implementation):
    with pytest.raises(ProbeFailed, match="does not see the body"):
        run_probe(make_model(implementation, checkpointing=True))


def test_probe_fires_without_causality(monkeypatch):
    from transformers import AttentionInterface

    def everything(module, query, key, value, attention_mask, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2), None

    AttentionInterface.register("test_everything", everything)
    with pytest.raises(ProbeFailed, match="not causal"):
        run_probe(make_model("test_everything", checkpointing=True))


def test_probe_fires_when_positions_are_ignored():
    model = make_model(attention.SDPA, checkpointing=True)
    stock = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: stock(x, torch.arange(position_ids.shape[1])[None])
    with pytest.raises(ProbeFailed, match="ignores position_ids"):
        run_probe(model)
