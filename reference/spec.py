"""The records a chapter ends with, and the registry that finds them.

A chapter is one module below a family package; it ends with ``MECHANISM = Mechanism(...)``.
Nothing is registered by hand: the registry walks the package, so adding a file adds a mechanism.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType
from typing import Any

PATTERNS = ("noncausal self", "causal self", "noncausal cross", "causal cross")
PHASES = ("prefill", "step by step", "chunked")
PADDINGS = ("none", "left", "right", "packed")
HEADS = ("MHA", "GQA", "MQA")


@dataclass(frozen=True)
class Paper:
    """Where a mechanism comes from. `code` names the authors' repository, or is empty."""

    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str = ""
    venue: str = ""
    code: str = ""


@dataclass(frozen=True)
class Operation:
    """One pure function of a chapter: the unit that a kernel claims and a contract judges.

    `gradient` is the chapter's own vector-Jacobian product of the function: it takes the same
    arguments with the output gradient ``dout`` behind the differentiable ones, and returns one
    gradient for each name in `differentiable`, in that order. `slug` is filled in by `Mechanism`.
    """

    function: Callable[..., Any]
    clauses: tuple[str, ...]
    gradient: Callable[..., Any] | None = None
    differentiable: tuple[str, ...] = ()
    slug: str = ""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def qualified_name(self) -> str:
        """``slug.function``, the name used on the command line and by `Kernel`."""
        return f"{self.slug}.{self.name}"

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.function)


@dataclass(frozen=True)
class Coverage:
    """The cells of the pattern x phase x padding x heads matrix that a mechanism defines.

    A cell outside is undefined for the mechanism: an implementation must refuse it.
    """

    patterns: tuple[str, ...]
    phases: tuple[str, ...] = ("prefill",)
    paddings: tuple[str, ...] = ("none",)
    heads: tuple[str, ...] = HEADS
    gradient: bool = False

    def __post_init__(self) -> None:
        for field, known in (
            ("patterns", PATTERNS),
            ("phases", PHASES),
            ("paddings", PADDINGS),
            ("heads", HEADS),
        ):
            unknown = set(getattr(self, field)) - set(known)
            if unknown:
                raise ValueError(f"{field}: got {sorted(unknown)}, expected some of {known}")


@dataclass(frozen=True)
class Mechanism:
    """A chapter's record. `headline` names the operation people mean by the mechanism.

    The headline's module gives the mechanism its slug and family; other operations may live in
    modules beside it.
    """

    title: str
    idea: str
    paper: Paper
    operations: tuple[Operation, ...]
    headline: str
    coverage: Coverage
    stepwise_equals_prefill: bool = True

    def __post_init__(self) -> None:
        names = [operation.name for operation in self.operations]
        if len(set(names)) != len(names):
            raise ValueError(f"operations: got the same name twice in {names}")
        if self.headline not in names:
            raise ValueError(f"headline: got {self.headline!r}, expected one of {names}")
        owned = tuple(replace(operation, slug=self.slug) for operation in self.operations)
        object.__setattr__(self, "operations", owned)

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.operation(self.headline).function.__module__)

    @property
    def slug(self) -> str:
        return self.operation(self.headline).function.__module__.rpartition(".")[2]

    @property
    def family(self) -> str:
        return self.module.__name__.split(".")[-2]

    def operation(self, name: str) -> Operation:
        for operation in self.operations:
            if operation.name == name:
                return operation
        known = ", ".join(operation.name for operation in self.operations)
        raise ValueError(f"operation: got {name!r}, expected one of: {known}")


@cache
def mechanisms() -> dict[str, Mechanism]:
    """Every chapter by slug, in the order family, then slug."""
    found: dict[str, Mechanism] = {}
    for module in _chapter_modules():
        record = getattr(module, "MECHANISM", None)
        if record is None:
            continue
        if record.slug in found:
            raise ValueError(f"slug: {record.slug!r} names two chapters, expected one")
        found[record.slug] = record
    return found


def find_mechanism(slug: str) -> Mechanism:
    """The chapter called `slug`; ValueError lists the known ones."""
    try:
        return mechanisms()[slug]
    except KeyError:
        known = ", ".join(mechanisms())
        raise ValueError(f"mechanism: got {slug!r}, expected one of: {known}") from None


def find_operation(qualified_name: str) -> Operation:
    """The operation called ``slug.function``; ValueError says which half is unknown."""
    slug, dot, name = qualified_name.partition(".")
    if not dot:
        raise ValueError(f"operation: got {qualified_name!r}, expected 'mechanism.operation'")
    return find_mechanism(slug).operation(name)


def _chapter_modules() -> Iterator[ModuleType]:
    package = importlib.import_module("attnspec.reference")
    for family in sorted(pkgutil.iter_modules(package.__path__), key=lambda info: info.name):
        if not family.ispkg or family.name == "primitives" or family.name.startswith("_"):
            continue
        family_package = importlib.import_module(f"{package.__name__}.{family.name}")
        for chapter in sorted(
            pkgutil.iter_modules(family_package.__path__), key=lambda info: info.name
        ):
            yield importlib.import_module(f"{family_package.__name__}.{chapter.name}")
