"""A small valid recipe for tests, changed field by field as `--set` does."""

from pathlib import Path

from endprompt.recipe import Recipe
from endprompt.recipe.load import load_recipe

TINY = Path(__file__).parent / "tiny.yaml"


def make_recipe(**overrides) -> Recipe:
    """The recipe tests/support/tiny.yaml with dotted fields overridden: make_recipe(**{"training.steps": 3})."""
    return load_recipe(TINY, [f"{field}={value}" for field, value in overrides.items()])
