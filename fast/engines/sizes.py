"""Sizes of grids and tiles on the host.

Triton's own functions of these names serve kernels too, and look for their compiler at each call,
which takes the host longer than a division.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 0 for 0."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def tile_width(n: int, least: int = 16) -> int:
    """The width of a tile that holds `n` channels: a power of two, by default at least the 16 of a
    matrix product.
    """
    return max(least, next_power_of_2(n))
