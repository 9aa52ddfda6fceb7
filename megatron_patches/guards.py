"""Guards: a patch runs only on the upstream code that it was written for, and says so in one line otherwise."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from endprompt.errors import UserError

OLDEST, BEYOND = (0, 16, 1), (0, 20)
"""Megatron-Core releases that the patches are held against: 0.16.1 and 0.19.2 run in CI; 0.20 is unknown."""


def check_version(found: str | None = None) -> tuple[int, ...]:
    """The installed megatron-core's version as numbers. Raises UserError outside of the supported range."""
    if found is None:
        found = _installed()
    numbers = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if numbers < OLDEST:
        raise UserError("megatron-core", f"{found} is older than {_dotted(OLDEST)}", f"install {_dotted(OLDEST)} to {_newest()}")
    if numbers >= BEYOND:
        raise UserError(
            "megatron-core",
            f"{found} is newer than the patches know ({_newest()})",
            f"install {_newest()}, or run tests/megatron_patches on it and raise BEYOND in megatron_patches/guards.py",
        )
    return numbers


def _installed() -> str:
    """From the package's metadata, which needs no import; from the module where it lies on the path without metadata."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        pass
    try:
        return import_module("megatron.core").__version__
    except ImportError:
        raise UserError("megatron-core", "is not installed", "pip install -r requirements.txt") from None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)


def _newest() -> str:
    return f"{BEYOND[0]}.{BEYOND[1] - 1}.x"


class Patch(NamedTuple):
    """One replaced upstream function. `why` is for the reader; the rest is checked before anything is touched.

    parameters: the leading parameters that the replacement relies on. calls: (owner, function, name) of an upstream function
    whose code must still call the patched one by this global name, or the patch would change nothing.
    """

    owner: str
    name: str
    why: str
    parameters: tuple[str, ...]
    replace: Callable[[Callable], Callable]
    calls: tuple[str, str, str] | None = None


def check_patch(patch: Patch) -> tuple[Any, Callable]:
    """(owner, upstream function). Raises UserError where upstream is not what the patch was written for."""
    owner = resolve(patch.owner)
    original = getattr(owner, patch.name, None)
    symbol = f"{patch.owner.replace(':', '.')}.{patch.name}"
    expect_signature(owner, patch.name, patch.parameters, symbol=symbol)
    if patch.calls:
        caller_owner, caller, name = patch.calls
        function = inspect.unwrap(getattr(resolve(caller_owner), caller))
        if name not in function.__code__.co_names:
            raise _changed(symbol, f"is no longer called by {caller_owner.replace(':', '.')}.{caller}")
    return owner, original


def expect_signature(owner: Any, name: str, parameters: tuple[str, ...], *, symbol: str | None = None, exact: bool = False) -> None:
    """Raises UserError unless `owner.name` is a function whose leading (exact: only) parameters are these."""
    function, symbol = getattr(owner, name, None), symbol or f"{owner.__name__}.{name}"
    if not callable(function):
        raise _changed(symbol, "is gone")
    found = tuple(inspect.signature(function).parameters)
    if (found if exact else found[: len(parameters)]) != parameters:
        raise _changed(symbol, f"takes ({', '.join(found)}), expected ({', '.join(parameters)}{'' if exact else ', ...'})")


def resolve(path: str) -> Any:
    """`package.module` or `package.module:Class`."""
    module, _, attribute = path.partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def _changed(symbol: str, problem: str) -> UserError:
    return UserError(symbol, f"{problem}: this Megatron-Core is not what the patch was written for", f"install megatron-core {_newest()}")
