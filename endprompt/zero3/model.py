"""The Hugging Face model as DeepSpeed trains it: tokens, positions and weights in, weighted loss sum out."""

from __future__ import annotations

import torch
from torch import nn

from endprompt.loss import weighted_next_token_loss


class WeightedLossHead(nn.Module):
    """Takes the place of `lm_head`; computes the loss inside its own forward, where ZeRO-3 has gathered the weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight  # [V, h], tied to the input embedding or not

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None, loss_weights: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [.., h] -> logits [.., V], or with labels int64 [..] and loss_weights fp32 [..] the fp32 loss sum."""
        if labels is None:
            return nn.functional.linear(hidden, self.weight)
        return weighted_next_token_loss(hidden, self.weight, labels, loss_weights)


class CausalLMForWeightedLoss(nn.Module):
    """Wraps a transformers causal LM. Parameter names are transformers' own behind the prefix `model.` (`hf_name`)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        model.lm_head = WeightedLossHead(model.lm_head)
        self.model = model

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        logits_at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids, position_ids: int64 [b, n].

        With labels int64 [b, n] and loss_weights fp32 [b, n] (both shifted): the sum of weight * cross-entropy, fp32 scalar.
        Without: logits [b, k, V] at the physical indices logits_at, int64 [k]; all n of them when it is None.
        """
        hidden = self.model.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        if labels is not None:
            return self.model.lm_head(hidden, labels, loss_weights)
        return self.model.lm_head(hidden if logits_at is None else hidden[:, logits_at])


def hf_name(name: str) -> str:
    """A wrapped parameter's name in Hugging Face files."""
    return name.removeprefix("model.")
