"""Wrong kernels on purpose: the suite must kill every one, by the law that claims it.

A mutant is made from the reference by changing one step (`replacing`), one argument (`altering`) or
one result (`spoiling`), or is written by hand. A mutant that no case can tell from a right kernel
is listed with the reason in `equivalent`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from attnspec.conformance.kernel import Kernel
from attnspec.reference import find_operation


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel: which operation, which `bug`, and the `law` that must catch it.

    `backward` is the wrong gradient function, for bugs that the forward pass does not show.
    `settings` are further fields of the `Kernel` that carries it.
    """

    name: str
    operation: str
    law: str
    bug: str
    call: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    equivalent: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def kernel(self) -> Kernel:
        settings = {"blocks": (8, 16), **self.settings}
        return Kernel(
            f"mutant:{self.name}", self.operation, self.call, backward=self.backward, **settings
        )


def right(operation: str) -> Callable[..., Any]:
    """The reference function of an operation: what a mutant starts from."""
    return find_operation(operation).function


def replacing(function: Callable[..., Any], **steps: Any) -> Callable[..., Any]:
    """`function` with names of its module replaced while it runs: a wrong step inside."""
    module = importlib.import_module(function.__module__)
    for name in steps:
        getattr(module, name)  # a name that is not there would kill the mutant by itself

    @functools.wraps(function)
    def mutant(*args: Any, **kwargs: Any) -> Any:
        with _patched(module, steps):
            return function(*args, **kwargs)

    return mutant


def altering(
    function: Callable[..., Any], change: Callable[[dict[str, Any]], None]
) -> Callable[..., Any]:
    """`function` called on arguments that `change` has tampered with (a dict by name)."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def mutant(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        change(bound.arguments)
        return function(*bound.args, **bound.kwargs)

    return mutant


def spoiling(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`function` whose result `change` has tampered with."""

    @functools.wraps(function)
    def mutant(*args: Any, **kwargs: Any) -> Any:
        return change(function(*args, **kwargs))

    return mutant


@contextmanager
def _patched(module: Any, steps: dict[str, Any]) -> Iterator[None]:
    originals = {name: getattr(module, name) for name in steps}
    for name, step in steps.items():
        setattr(module, name, step)
    try:
        yield
    finally:
        for name, step in originals.items():
            setattr(module, name, step)


@cache
def mutants() -> tuple[Mutant, ...]:
    """Every mutant, found by walking this package."""
    found: list[Mutant] = []
    for info in pkgutil.walk_packages(__path__, f"{__name__}."):
        found += getattr(importlib.import_module(info.name), "MUTANTS", ())
    return tuple(found)
