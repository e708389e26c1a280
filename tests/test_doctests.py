"""Every example in a docstring of the reference runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import attnspec.reference

MODULES = [
    info.name
    for info in pkgutil.walk_packages(attnspec.reference.__path__, "attnspec.reference.")
    if not info.name.startswith("attnspec.reference._root")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0
