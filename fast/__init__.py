"""Production kernels: Triton on CUDA tensors, Numba on CPU tensors, one Python surface.

``attnspec.fast.<mechanism>`` is the module of a mechanism and holds its operations under the names
and keywords of `attnspec.reference`; importing this package imports neither torch nor a kernel.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType
from typing import Any

FUNCTIONS = {"scaled_dot_product_attention": f"{__name__}.sdpa"}
"""Functions that belong to no mechanism, and the modules that hold them."""

BRIDGES = ("transformers",)
"""Packages that bring the mechanisms into another library."""


def mechanism_modules() -> dict[str, str]:
    """Module path of every mechanism by slug, read from the family folders."""
    found = {}
    for family in pkgutil.iter_modules(__path__):
        if family.ispkg and family.name not in ("engines", *BRIDGES):
            folder = [f"{path}/{family.name}" for path in __path__]
            for chapter in pkgutil.iter_modules(folder):
                found[chapter.name] = f"{__name__}.{family.name}.{chapter.name}"
    return found


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(_load(FUNCTIONS[name]), name)
    path = f"{__name__}.{name}" if name in BRIDGES else mechanism_modules().get(name)
    if path is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _load(path)


def _load(path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            'torch is not installed: pip install "attnspec[fast]"', name="torch"
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *FUNCTIONS, *BRIDGES, *mechanism_modules()])
