"""The chunked weighted loss against torch's cross-entropy on whole logits, and its memory against Hugging Face's loss."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks.bench_loss import measure
from endprompt.loss import global_weight_scale, shift_for_next_token, weighted_next_token_loss


def reference(hidden, weight, labels, loss_weights):
    logits = (hidden @ weight.t()).float()
    losses = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return (losses * loss_weights.flatten()).sum()


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 53, 32, generator=generator)
    weight = torch.randn(301, 32, generator=generator) * 0.3
    labels = torch.randint(0, 301, (2, 53), generator=generator)
    loss_weights = torch.rand(2, 53, generator=generator)
    loss_weights[0, :7] = 0
    return hidden, weight, labels, loss_weights


@pytest.mark.parametrize("chunk_tokens", [1, 7, 106, 1000, None])
def test_value_and_gradients_equal_the_whole_sequence_loss(problem, chunk_tokens):
    hidden, weight, labels, loss_weights = problem
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss = weighted_next_token_loss(*ours, labels, loss_weights, chunk_tokens=chunk_tokens)
    expected = reference(*theirs, labels, loss_weights)
    (loss * 0.37).backward()
    (expected * 0.37).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for got, want in zip(ours, theirs, strict=True):
        assert ((got.grad - want.grad).norm() / want.grad.norm()).item() < 1e-5


def test_gradient_is_linear_in_the_weights(problem):
    hidden, weight, labels, loss_weights = problem
    one, doubled = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    weighted_next_token_loss(one, weight, labels, loss_weights).backward()
    weighted_next_token_loss(doubled, weight, labels, 2 * loss_weights).backward()
    torch.testing.assert_close(doubled.grad, 2 * one.grad)
    assert one.grad[0, :7].abs().max() == 0, "a token of weight 0 must not move anything"


def test_bf16_adds_chunks_in_fp32(problem):
    hidden, weight, labels, loss_weights = problem
    exact = weight.clone().requires_grad_()
    reference(hidden, exact, labels, loss_weights).backward()
    error = {}
    for chunk_tokens in (1, 1000):
        rounded = weight.bfloat16().requires_grad_()
        weighted_next_token_loss(hidden.bfloat16(), rounded, labels, loss_weights, chunk_tokens=chunk_tokens).backward()
        assert rounded.grad.dtype == torch.bfloat16
        error[chunk_tokens] = ((rounded.grad.float() - exact.grad).norm() / exact.grad.norm()).item()
    assert error[1] < 1.5 * error[1000] < 0.02, error


def test_without_gradients_nothing_is_kept(problem):
    with torch.no_grad():
        torch.testing.assert_close(weighted_next_token_loss(*problem), reference(*problem), rtol=1e-6, atol=0)


def test_second_backward_is_refused(problem):
    hidden, *rest = problem
    loss = weighted_next_token_loss(hidden.requires_grad_(), *rest)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_shift_gives_each_state_the_token_it_predicts():
    tokens = torch.tensor([[5, 6, 7, 8]])
    weights = torch.tensor([[0.0, 1.0, 0.5, 0.25]])
    labels, shifted = shift_for_next_token(tokens, weights)
    assert labels[0, :3].tolist() == [6, 7, 8] and shifted.tolist() == [[1.0, 0.5, 0.25, 0.0]]
    assert shifted.sum() == weights.sum()


def test_scale_makes_engine_averages_the_global_weighted_mean():
    """Ranks x micro-batches with unequal weights: averaging the scaled sums must give sum(w l) / sum(w)."""
    losses, weights = torch.rand(2, 3, 10), torch.rand(2, 3, 10)
    weights[1, 2] = 0.01
    scale = global_weight_scale(weights.double().sum(), data_parallel=2, micro_steps=3)
    averaged = ((losses * weights).sum(-1) * scale).mean()
    torch.testing.assert_close(averaged, (losses * weights).sum() / weights.sum())


def test_peak_memory_is_at_most_a_quarter_of_the_ordinary_loss():
    """At Llama-3's vocabulary and 8192 tokens, each in a process of its own (peak resident set, MB)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable"))
    if available < 16:
        pytest.skip(f"the ordinary loss alone needs 13 GB of memory, {available:.0f} GB are free")
    peak = {side: measure(side)["peak_mb"] for side in ("ours", "ordinary")}
    assert peak["ordinary"] > 8000, f"the yardstick itself is off: {peak}"
    assert peak["ours"] <= peak["ordinary"] / 4, peak


def test_logits_beyond_the_range_of_exp_give_finite_losses_and_gradients():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 8).mul_(20).requires_grad_() for n in (6, 50))  # logits of some +-1000; exp overflows at 89
    labels = torch.randint(0, 50, (6,))
    weighted_next_token_loss(hidden, weight, labels, torch.ones(6), chunk_tokens=4).backward()
    found = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum").backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))
