"""Read a recipe: YAML, `${VARIABLE}` references, `--set a.b=c` overrides, and errors that name file, field and fix."""

from __future__ import annotations

import argparse
import difflib
import os
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from endprompt.errors import UserError
from endprompt.recipe.schema import Recipe

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice (the standard loader keeps the last one silently)."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if not isinstance(key.value, str):
                continue  # a list or mapping as key, which the standard loader refuses
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The two arguments that every recipe-driven command shares."""
    parser.add_argument("--recipe", required=True, metavar="FILE", help="recipe in YAML (see recipes/)")
    parser.add_argument(
        "--set", action="append", default=[], dest="overrides", metavar="FIELD=VALUE",
        help="override one field, for instance --set training.learning_rate=1e-5; may be repeated",
    )  # fmt: skip


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Load and check a recipe. Raises UserError with file, field and fix for anything that is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(path, "no such recipe", f"choose one of recipes/*.yaml{_closest(path)}")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}: line {mark.line + 1}" if mark else path
        raise UserError(where, f"not valid YAML ({getattr(error, 'problem', None) or error})", "correct the syntax") from None
    if not isinstance(raw, dict):
        raise UserError(path, "holds no mapping", "start from one of recipes/*.yaml")
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        raw = _expand(raw, path, "")
    except RecursionError:
        raise UserError(path, "holds an alias of something that contains it", "write it out") from None
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise _explain(path, error) from None


def _closest(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("recipes")
    near = difflib.get_close_matches(path.name, [p.name for p in folder.glob("*.yaml")], n=1)
    return f" (did you mean {folder / near[0]}?)" if near else ""


def _apply_override(raw: dict, override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field.strip():
        raise UserError(f"--set {override}", "is not FIELD=VALUE", "write for instance --set training.learning_rate=1e-5")
    try:
        value = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError:
        raise UserError(f"--set {override}", "the value is not valid YAML", "quote it") from None
    keys = field.strip().split(".")
    at: Any = raw
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(at, list):
            if not key.isdigit() or int(key) >= len(at):
                raise UserError(f"--set {override}", f"{key!r} is not an item of a list of {len(at)}", "count items from 0")
            key = int(key)
        elif not isinstance(at, dict):
            raise UserError(f"--set {override}", f"{'.'.join(keys[:depth])} is a value, not a section", "name a field of the recipe")
        if last:
            at[key] = value
        else:
            if isinstance(at, dict) and at.get(key) is None:
                at[key] = {}
            at = at[key]


def _expand(value: Any, path: Path, field: str) -> Any:
    """Replace ${NAME} and ${NAME:-default} in strings by environment variables."""
    if isinstance(value, dict):
        return {k: _expand(v, path, f"{field}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand(v, path, f"{field}.{i}") for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value

    def substitute(match: re.Match) -> str:
        found = os.environ.get(match[1]) or match[2]
        if found is None:
            raise UserError(f"{path}: {field}", f"environment variable {match[1]} is not set", f"export {match[1]} or write the path here")
        return found

    return _VARIABLE.sub(substitute, value)


def _explain(path: Path, error: ValidationError) -> UserError:
    """The first thing pydantic found, in our words."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"] if not (isinstance(part, str) and part[:1].isupper())]
    field, kind, message = ".".join(location), first["type"], first["msg"].removeprefix("Value error, ")
    given = first.get("input")
    if kind == "missing":
        return UserError(f"{path}: {field}", "is missing", "add it (recipes/*.yaml show how)")
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _fields_at(location[:-1]), n=1)
        return UserError(f"{path}: {field}", "unknown field", f"did you mean {near[0]}?" if near else "remove it")
    if kind == "value_error" and re.match(r"^[a-z_.]+: ", message):  # a check across sections names its own field
        message_field, _, rest = message.partition(": ")
        problem, _, fix = rest.partition("; ")
        return UserError(f"{path}: {message_field}", problem, fix or "correct it")
    problem, _, fix = message.partition("; ")
    if kind != "value_error":
        shown = "" if isinstance(given, (dict, list)) else f", found {given!r}"
        problem, fix = problem[:1].lower() + problem[1:] + shown, "correct it"
    return UserError(f"{path}: {field}" if field else path, problem, fix or "correct it")


def _fields_at(location: list[str]) -> list[str]:
    """Names of the fields of the section at `location`, for 'did you mean'."""
    section: type[BaseModel] | None = Recipe
    for part in location:
        annotation = section.model_fields[part].annotation if section and part in section.model_fields else None
        section = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    return list(section.model_fields) if section else []
