"""The recipe: the single source of truth of a run."""

from endprompt.recipe.load import add_recipe_arguments, load_recipe
from endprompt.recipe.schema import Recipe

__all__ = ["Recipe", "add_recipe_arguments", "load_recipe"]
