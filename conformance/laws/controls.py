"""Negative controls: numbers that must keep clear of what another function would give.

`agreement` asks whether a kernel is the reference. A control asks what neither may be, on a case
made so that the two functions lie far apart, and names the one that a kernel was taken for.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from attnspec.conformance.contract import Contract
from attnspec.conformance.kernel import Kernel
from attnspec.conformance.violation import Violation


def several(
    contract: Contract, kernel: Kernel, axis: str, least: int
) -> dict[str, st.SearchStrategy[int]]:
    """`least` of an axis or more, so that even the first case shows the difference.

    A kernel's own limits on the axis are left to say what there is.
    """
    if axis in kernel.limits:
        return {}
    return {axis: st.integers(least, contract.sizes[axis][1])}


def check_apart(name: str, got: np.ndarray, other: np.ndarray, gap: float, like: str) -> None:
    """Every entry of `got` is at least `gap` away from that of `other`.

    A gap is at most half of what lies between the two in exact numbers, and far above the rounding
    of any dtype. `like` says what an output too near `other` is.
    """
    if not np.all(np.abs(got - other) >= gap):
        raise Violation(name, f"less than {gap} from what it must not be: {like}")
