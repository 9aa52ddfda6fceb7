"""Learning rates against transformers' schedules, which the paper's runs used."""

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from endprompt.training.schedule import learning_rate
from tests.support.recipes import make_recipe


def rates_of(scheduler_factory, steps, rate):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = scheduler_factory(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_constant_with_warmup_is_that_of_transformers(warmup):
    recipe = make_recipe(**{"training.steps": 30, "training.warmup_steps": warmup, "training.learning_rate": 2e-5})
    expected = rates_of(lambda o: get_constant_schedule_with_warmup(o, warmup), 30, 2e-5)
    assert [learning_rate(recipe, step) for step in range(30)] == pytest.approx(expected, rel=1e-12)


def test_cosine_is_that_of_transformers_and_ends_at_the_minimum():
    fields = {"training.steps": 30, "training.warmup_steps": 5, "training.learning_rate": 1e-3, "training.schedule": "cosine"}
    recipe = make_recipe(**fields)
    expected = rates_of(lambda o: get_cosine_schedule_with_warmup(o, 5, 30), 30, 1e-3)
    assert [learning_rate(recipe, step) for step in range(30)] == pytest.approx(expected, rel=1e-12)
    floored = make_recipe(**fields, **{"training.min_learning_rate": 1e-4})
    assert learning_rate(floored, 30) == pytest.approx(1e-4) and learning_rate(floored, 5) == pytest.approx(1e-3)
