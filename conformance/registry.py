"""Finding kernels: the entry-point group ``attnspec.kernels``, or ``package.module:attribute``."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from typing import Any

from attnspec.conformance.kernel import Kernel

GROUP = "attnspec.kernels"


class Unavailable(ValueError):
    """Registered kernels cannot be loaded, because something they need is not installed."""


def registered_kernels() -> list[Kernel]:
    """Kernels of every installed package that declares the entry-point group.

    An entry point is a `Kernel`, an iterable of kernels, or a function that returns either. A
    package that cannot be loaded raises, `Unavailable` if something it needs is not installed: a
    suite that skips in silence is no suite.
    """
    kernels: list[Kernel] = []
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        source = f"entry point {point.name!r}"
        try:
            kernels += as_kernels(point.load(), source)
        except ImportError as error:
            raise Unavailable(f"{source} ({point.value}): {error}") from error
    return kernels


def load_kernels(path: str | None, operation: str | None, array: str | None) -> list[Kernel]:
    """The registered kernels, or those at ``package.module:attribute``.

    A bare function there is a kernel too, if `operation` and `array` say what it computes and on
    which arrays.
    """
    if path is None:
        return registered_kernels()
    found = load_object(path)
    if operation is None and not isinstance(found, Kernel) and _needs_arguments(found):
        raise ValueError(
            f"--operation: got nothing, expected what the function {path} computes, and --array"
        )
    if operation is not None:
        if array is None:
            raise ValueError("--array: got nothing, expected numpy or torch beside --operation")
        return [Kernel(path.rpartition(":")[2], operation, found, array=array)]
    return as_kernels(found, path)


def _needs_arguments(value: Any) -> bool:
    if not callable(value):
        return False
    parameters = inspect.signature(value).parameters.values()
    return any(
        p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters
    )


def as_kernels(value: Any, source: str) -> list[Kernel]:
    """`value` as a list of kernels; TypeError names `source` if it is none."""
    if isinstance(value, Kernel):
        return [value]
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return as_kernels(value(), source)
    if isinstance(value, Iterable):
        kernels = list(value)
        if all(isinstance(kernel, Kernel) for kernel in kernels):
            return kernels
    raise TypeError(f"{source}: got {type(value).__name__}, expected Kernel objects")


def load_object(path: str) -> Any:
    """The object at ``package.module:attribute``; ValueError says which part is missing."""
    module_name, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"kernel: got {path!r}, expected 'package.module:attribute'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"kernel: cannot import {module_name!r}: {error}") from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise ValueError(f"kernel: module {module_name!r} has no {attribute!r}") from None


def select(kernels: Iterable[Kernel], selectors: Iterable[str]) -> list[Kernel]:
    """The kernels whose mechanism, operation or name is among `selectors` (all if none given)."""
    kernels, wanted = list(kernels), list(selectors)
    if not wanted:
        return kernels
    chosen = []
    for selector in wanted:
        matching = [
            kernel
            for kernel in kernels
            if selector in (kernel.name, kernel.operation, kernel.operation.partition(".")[0])
        ]
        if not matching:
            raise ValueError(f"select: got {selector!r}, expected a mechanism, operation or kernel")
        chosen += [kernel for kernel in matching if kernel not in chosen]
    return chosen
