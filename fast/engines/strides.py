"""Strides as Triton's kernels take them: counted in 16 bytes where rows are aligned.

The compiler then knows rows to begin at multiples of 16 bytes, and reads them in such words, though
it is not told the strides; a length that changes does not compile a kernel again.
"""

from __future__ import annotations

from torch import Tensor


def layout_of(x: Tensor) -> tuple[int, tuple[int, ...]]:
    """Elements of a unit, and the strides of x (..., d), those of its rows in units.

    A unit is 16 bytes if rows are contiguous and begin at multiples of them, else an element.
    """
    unit, strides = 16 // x.element_size(), x.stride()
    *rows, d = strides
    if d != 1 or x.data_ptr() & 15:
        return 1, strides
    for size, stride in zip(x.shape, rows, strict=False):
        # The stride of an axis of size 1 is never used.
        if stride % unit and size > 1:
            return 1, strides
    return unit, (*(stride // unit for stride in rows), d)
