"""Strides as Triton's kernels take them: counted in 16 bytes where rows are aligned.

The compiler then knows rows to begin at multiples of 16 bytes, and reads them in such words, though
it is not told the strides; a length that changes does not compile a kernel again.
"""

from __future__ import annotations

from torch import Tensor


def unit_of(x: Tensor) -> int:
    """Elements in 16 bytes if the rows of x (..., d) are contiguous and begin at multiples of them,
    else 1.
    """
    unit = 16 // x.element_size()
    apart = all(n == 1 or s % unit == 0 for n, s in zip(x.shape[:-1], x.stride(), strict=False))
    return unit if apart and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else 1


def strides_of(x: Tensor) -> tuple[int, ...]:
    """The strides of x, those of its rows in units."""
    unit = unit_of(x)
    *rows, d = x.stride()
    return *(stride // unit for stride in rows), d
