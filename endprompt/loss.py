"""Weighted next-token cross-entropy that never holds the logits of the whole sequence.

For hidden states h_i, head W, next tokens y_i and weights w_i it returns the *sum* of w_i * ce(W h_i, y_i). The caller
divides by the global sum of weights over micro-batches and data-parallel ranks (`global_weight_scale`), because a mean
per micro-batch would weigh samples differently whenever their weights differ.

Memory at vocabulary V, n tokens, chunk c: 4 c V bytes of fp32 logits (6 c V in bf16) and the gradient of W, instead of about
12 n V bytes. At V = 128256, n = 8192 the ordinary loss holds bf16 and fp32 logits and their gradients: (2 + 4 + 4 + 2) n V = 12.6 GB.
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 128 * 2**20
"""fp32 logits held at a time. 128 MiB is 261 tokens at V = 128256, 682 at 49152: still large enough for full-speed GEMMs."""


def shift_for_next_token(tokens: torch.Tensor, loss_weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Align targets with the states that predict them.

    tokens: int64 [..., n]; loss_weights: fp32 [..., n], entry i being the weight of predicting token i.
    Returns (labels int64 [..., n], weights fp32 [..., n]): entry i belongs to token i + 1; the last weight is 0.
    """
    labels = torch.zeros_like(tokens)
    labels[..., :-1] = tokens[..., 1:]
    weights = torch.zeros_like(loss_weights)
    weights[..., :-1] = loss_weights[..., 1:]
    return labels, weights


def global_weight_scale(step_weight: torch.Tensor, data_parallel: int, micro_steps: int) -> torch.Tensor:
    """Factor that turns a rank's micro-batch loss sum into its share of the step's loss.

    step_weight: fp64 scalar, sum of weights over every micro-batch of every rank of this step.
    Engines average gradients over ranks and (DeepSpeed) over micro-batches, so the share is multiplied by both counts.
    """
    return (data_parallel * micro_steps / step_weight).float()


def weighted_next_token_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, loss_weights: torch.Tensor, *, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Sum over tokens of loss_weights * cross-entropy(hidden @ weight.T, labels), as an fp32 scalar.

    hidden: [..., h] bf16 or fp32, the final normed states. weight: [V, h], the output head, same dtype.
    labels: int64 [...]; loss_weights: fp32 [...]; both already shifted (`shift_for_next_token`).
    Differentiable once, in hidden and weight; products are made in the input dtype, softmax and sums in fp32.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    chunk = chunk_tokens or max(1, CHUNK_BYTES // (4 * weight.shape[0]))
    return _WeightedCrossEntropy.apply(rows, weight, labels.reshape(-1), loss_weights.reshape(-1).float(), chunk)


class _WeightedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, while the chunk's softmax is at hand.

    The loss is linear in the later scalar (1 / global weight), so backward only scales them: three products with W in
    all, as the ordinary loss needs, and no logits are kept or recomputed.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, loss_weights, chunk):
        wants_hidden, wants_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in fp32: a bf16 sum over many chunks would lose the small ones (8 bits of mantissa).
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants_weight else None
        # One pair of buffers for all chunks: a CPU zeroes the pages of fresh ones each time, which costs as much as the softmax.
        chunk = min(chunk, hidden.shape[0])
        wide = torch.empty((chunk, weight.shape[0]), dtype=torch.float32, device=hidden.device)
        narrow = wide if hidden.dtype == torch.float32 else torch.empty_like(wide, dtype=hidden.dtype)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            h, y, w = hidden[part], labels[part].unsqueeze(1), loss_weights[part].unsqueeze(1)
            logits, product = wide[: len(h)], narrow[: len(h)]
            torch.mm(h, weight.t(), out=product)
            if narrow is not wide:
                logits.copy_(product)
            target, largest = logits.gather(1, y), logits.amax(dim=1, keepdim=True)
            normaliser = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
            total += ((largest + normaliser.log() - target) * w).sum()
            if not (wants_hidden or wants_weight):
                continue
            # d(w * ce)/d(logits) = w * (softmax - onehot), built in place of the logits.
            grad = logits.mul_(w / normaliser).scatter_add_(1, y, -w)
            if narrow is not wide:
                grad = product.copy_(grad)
            if wants_hidden:
                torch.mm(grad, weight, out=grad_hidden[part])
            if wants_weight and hidden.dtype == torch.float32:
                grad_weight.addmm_(grad.t(), h)
            elif wants_weight:
                grad_weight += grad.t() @ h
        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        if ctx.grads is None:
            raise RuntimeError("weighted_next_token_loss was differentiated twice; its gradient buffers are used up by the first time")
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None
