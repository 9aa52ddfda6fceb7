"""Repair Megatron's distributed-optimizer checkpoints where torch's AdamW stands in for the fused Adam.

Without Transformer Engine and without apex, Megatron-Core falls back to torch.optim.AdamW, on a GPU as on a CPU, and its
DistributedOptimizer can then train, but not save and resume. Measured with 0.16.1 and 0.19.2:

1. A fresh optimizer has no state yet; `state_dict()` asserts that exactly one `step` exists. Every load begins with it, so
   no new process can load a checkpoint.
2. The loader of a parameter looks for a `step` beside exp_avg and exp_avg_sq: KeyError in the `fully_reshardable` form; in
   the `dp_reshardable` form it finds the fresh optimizer's 0, and the count that was just loaded is lost.
3. `load_state_dict()` gives all parameters the same `step` tensor. torch counts in place, once a parameter, so a resumed
   Adam of 27 parameters counts 27 steps within its first, and the loss leaves the unbroken run's.
4. The `dp_reshardable` loader copies into fp32 parameters with gradients enabled: "a view of a leaf Variable ...".

Nothing is copied from Megatron: the three methods are wrapped. Optimizers other than torch's Adam and AdamW pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_patches.guards import check_version, expect_signature

# The methods of DistributedOptimizer that are wrapped, with the parameters that the wrappers rely on.
SIGNATURES = {
    "state_dict": ("self",),
    "load_state_dict": ("self", "state_dict"),
    "_set_main_param_and_optimizer_states": ("self", "model_param", "tensors"),
}

_originals: dict[str, Callable] = {}


def install() -> bool:
    """Wrap the three methods; True if they are wrapped now, False where Megatron uses a fused Adam and needs no repair.

    May be called again. Raises UserError for a Megatron-Core of another release or with other methods.
    """
    from megatron.core.optimizer import distrib_optimizer

    if distrib_optimizer.HAVE_APEX_OR_TE:
        return False
    if _originals:
        return True
    check_version()
    optimizer_class = distrib_optimizer.DistributedOptimizer
    for name, parameters in SIGNATURES.items():
        expect_signature(optimizer_class, name, parameters, exact=True)
    wrappers = {
        "state_dict": _state_dict,
        "load_state_dict": _load_state_dict,
        "_set_main_param_and_optimizer_states": _set_states,
    }
    for name, wrapper in wrappers.items():
        _originals[name] = getattr(optimizer_class, name)
        setattr(optimizer_class, name, wrapper)
    return True


def remove() -> None:
    """Put Megatron's own methods back."""
    if not _originals:
        return
    from megatron.core.optimizer import distrib_optimizer

    for name, original in _originals.items():
        setattr(distrib_optimizer.DistributedOptimizer, name, original)
    _originals.clear()


def _state_dict(self) -> dict[str, Any]:
    """Fault 1: give a fresh Adam the state that its first step would, so that there is a `step` to report."""
    adam = self.optimizer
    if _is_torch_adam(adam):
        for group in adam.param_groups:
            for parameter in group["params"]:
                if not adam.state[parameter]:
                    adam.state[parameter].update(_fresh_state(group, parameter))
    return _originals["state_dict"](self)


def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
    """Fault 3: every parameter gets its own `step`."""
    _originals["load_state_dict"](self, state_dict)
    if _is_torch_adam(self.optimizer):
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()


def _set_states(self, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
    """Fault 2: a checkpoint keeps `step` once, with the groups; load_state_dict() has set it already, so it stays."""
    if _is_torch_adam(self.optimizer):
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            tensors = {**tensors, "step": state["step"].clone()}
    with torch.no_grad():  # fault 4
        _originals["_set_main_param_and_optimizer_states"](self, model_param, tensors)


def _is_torch_adam(optimizer: object) -> bool:
    return isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _fresh_state(group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """What torch's Adam makes of a parameter that it has not stepped yet. It counts on the CPU unless fused or capturable."""
    counts_on_device = group.get("fused") or group.get("capturable")
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device if counts_on_device else "cpu"),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }
    if group.get("amsgrad"):
        state["max_exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
