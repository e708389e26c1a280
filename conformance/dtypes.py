"""The dtypes kernels may claim, and rounding to them in NumPy (which has no bfloat16)."""

from __future__ import annotations

import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "float64")
EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 5e-324, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def accumulator(dtype: str) -> str:
    """K10: the dtype in which a kernel of `dtype` accumulates."""
    return "float64" if dtype == "float64" else "float32"


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to nearest-even `dtype`; bfloat16 values come back as float32."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype)
    single = np.ascontiguousarray(x, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(single), rounded.view(np.float32), single).reshape(x.shape)
