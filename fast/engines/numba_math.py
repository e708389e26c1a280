"""Mathematics for the CPU kernels that LLVM's vectoriser can widen, unlike a call to libm."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

_LOG2E = np.float32(1 / math.log(2))
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(math.log(2) - 0.693359375)
_LOWEST, _HIGHEST = np.float32(-87.3), np.float32(88.7)
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_INFINITY = np.float32(np.inf)
_C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@intrinsic
def _float32_from_bits(typing_context: Any, bits: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        low = builder.trunc(arguments[0], ir.IntType(32)) if bits.bitwidth > 32 else arguments[0]
        return builder.bitcast(low, ir.FloatType())

    return types.float32(bits), generate


float32_from_bits: Any = _float32_from_bits
"""The float32 whose bit pattern is the low 32 bits of an integer."""


@njit(cache=True, nogil=True, fastmath={"contract"})
def exp_f32(x: Any) -> Any:
    """e^x of a float32 to about one ulp; 0 below -87.3 (no subnormals), so -inf gives 0; NaN stays.

    2^n times a Taylor polynomial on |r| <= ln(2) / 2, with ln(2) in two parts: n times the high
    one is exact.
    """
    inside = min(max(x, _LOWEST), _HIGHEST)
    n = np.floor(inside * _LOG2E + _HALF)
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    y = _C7
    y = y * r + _C6
    y = y * r + _C5
    y = y * r + _C4
    y = y * r + _C3
    y = y * r + _C2
    y = (y * r) * r + r + _ONE
    # 2^128 is not a float32: half of n goes into each factor.
    low = np.int32(n) >> 1
    high = np.int32(n) - low
    y = y * float32_from_bits((low + 127) << 23)
    y = y * float32_from_bits((high + 127) << 23)
    y = _ZERO if x < _LOWEST else y
    y = _INFINITY if x > _HIGHEST else y
    return x if x != x else y


def exp(x: float) -> float:
    """e^x inside a kernel: `exp_f32` for float32, the library's for float64."""
    return math.exp(x)


@overload(exp, strict=False)
def _exp(x: Any) -> Any:
    if x == types.float32:
        return lambda x: exp_f32(x)
    return lambda x: math.exp(x)
