"""The repair of the distributed optimizer by itself; what it does to whole trainings is in test_cpu_backend.py."""

import types

import pytest
import torch

from megatron_patches import torch_adam


def test_the_repair_touches_only_torchs_adam(monkeypatch):
    given = []
    monkeypatch.setitem(torch_adam._originals, "state_dict", lambda self: {"kept": True})
    monkeypatch.setitem(torch_adam._originals, "_set_main_param_and_optimizer_states", lambda self, p, tensors: given.append(tensors))
    sgd = types.SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    assert torch_adam._state_dict(sgd) == {"kept": True} and not sgd.optimizer.state
    torch_adam._set_states(sgd, None, {"param": 1})
    assert given == [{"param": 1}]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}])
def test_the_state_of_a_fresh_adam_is_that_before_its_first_step(options):
    """Two steps from the given state equal two steps from none, bit for bit."""
    stepped = []
    for given in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5))
        adam = torch.optim.AdamW([weight], lr=0.1, **options)
        if given:
            adam.state[weight].update(torch_adam._fresh_state(adam.param_groups[0], weight))
        for _ in range(2):
            weight.grad = weight.detach() * 3
            adam.step()
        stepped.append((weight.detach(), {name: value.clone() for name, value in adam.state[weight].items()}))
    assert torch.equal(stepped[0][0], stepped[1][0]) and stepped[0][1].keys() == stepped[1][1].keys()
    assert all(torch.equal(value, stepped[1][1][name]) for name, value in stepped[0][1].items())
