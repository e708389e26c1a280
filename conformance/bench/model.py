"""What is measured: a benchmark, its cost and its rivals."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Cost:
    """The least a run must do: `flops` (multiply and add count two) and `bytes` of memory traffic.

    Every input is read once and every output written once; nothing intermediate touches memory.
    """

    flops: float
    bytes: float

    def floor_seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """The roofline: whichever of arithmetic and traffic takes longer."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)


@dataclass(frozen=True)
class Rival:
    """What a user would call instead.

    prepare(arguments) returns the call to time, or raises `Unavailable` with the reason (a
    library that is missing, a backend that refuses the case): the table then shows the reason.
    """

    name: str
    prepare: Callable[[Mapping[str, Any]], Callable[[], Any]]


class Unavailable(Exception):
    """This rival cannot run this benchmark here; the message says why."""


@dataclass(frozen=True)
class Benchmark:
    """One measured case of an operation.

    make(device, dtype) builds the arguments as torch tensors; `call` maps the kernel's function
    and the arguments to the call that is timed (the operation itself unless given, for instance
    forward and backward). A `captured` one is timed as a CUDA graph, and so are its rivals: what
    the device takes, past the host, whose time is most of a short call's.
    """

    operation: str
    name: str
    device: str
    make: Callable[[str, Any], dict[str, Any]]
    cost: Callable[[Mapping[str, Any]], Cost]
    dtype: str = "bfloat16"
    call: Callable[[Callable[..., Any], Mapping[str, Any]], Callable[[], Any]] | None = None
    rivals: tuple[Rival, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    captured: bool = False

    def __post_init__(self) -> None:
        if self.captured and self.device != "cuda":
            raise ValueError(f"captured: got True on {self.device}, expected cuda: it has graphs")

    def in_a_graph(self) -> Benchmark:
        """The same case as a decoder that captures its step meets it."""
        return replace(self, name=f"{self.name}, in a graph", captured=True)

    def timed(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """The call to time on the kernel's `function`."""
        if self.call is not None:
            return self.call(function, arguments)
        return lambda: function(**arguments)


@cache
def benchmarks() -> tuple[Benchmark, ...]:
    """Every benchmark, found in the contract modules beside the contracts."""
    found: list[Benchmark] = []
    package = importlib.import_module("attnspec.conformance.contracts")
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        found += getattr(importlib.import_module(info.name), "BENCHMARKS", ())
    return tuple(found)
