"""Tensor descriptors for a kernel, of which only the tensor changes from launch to launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

Described = tuple[type, dict[str, Any]]
"""The class of a descriptor, and its fields but the tensor."""


def described(x: Any) -> Described | None:
    """What a descriptor says of a tensor; None if `x` is none. Gluon's are of a class of their own,
    with the layout of a tile.
    """
    if not isinstance(getattr(x, "base", None), Tensor):
        return None
    return type(x), vars(x) | {"base": None}


def descriptor(how: Described, x: Tensor) -> Any:
    """The descriptor of `x`, past the checks that the first of its kind has passed."""
    kind, fields = how
    made: Any = object.__new__(kind)
    vars(made).update(fields)
    made.base = x
    return made
