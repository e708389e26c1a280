"""The universal laws, written once and applied to every operation whose contract allows."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.laws.base import Law


@cache
def laws() -> dict[str, Law]:
    """Every law by name, found by walking this package."""
    found: dict[str, Law] = {}
    for info in pkgutil.iter_modules(__path__):
        for law in getattr(importlib.import_module(f"{__name__}.{info.name}"), "LAWS", ()):
            found[law.name] = law
    return found


def laws_for(contract: Contract, kernel: Kernel) -> list[Law]:
    """The laws that speak about `kernel`, agreement first."""
    applicable = [law for law in laws().values() if law.applies(contract, kernel)]
    return sorted(applicable, key=lambda law: law.name != "agreement")
