"""The universal laws, written once and applied to every operation whose contract allows.

A promise of one mechanism alone is a `Law` in the ``LAWS`` of its contracts module.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law


@cache
def laws() -> dict[str, Law]:
    """Every law by name, found by walking this package and the contracts."""
    names = [f"{__name__}.{info.name}" for info in pkgutil.iter_modules(__path__)]
    contracts = importlib.import_module("attnspec.conformance.contracts")
    walk = pkgutil.walk_packages(contracts.__path__, f"{contracts.__name__}.")
    found: dict[str, Law] = {}
    for name in (*names, *(info.name for info in walk)):
        for law in getattr(importlib.import_module(name), "LAWS", ()):
            if law.name in found:
                raise ValueError(f"law: {law.name!r} names two laws, expected one")
            found[law.name] = law
    return found


def laws_for(contract: Contract, kernel: Kernel) -> list[Law]:
    """The laws that speak about `kernel`, agreement first."""
    applicable = [law for law in laws().values() if law.applies(contract, kernel)]
    return sorted(applicable, key=lambda law: law.name != "agreement")
