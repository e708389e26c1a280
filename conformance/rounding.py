"""The rounded run: the reference executed as a correct kernel of a given dtype would.

`Rounded` is an array class under which the unchanged reference behaves like tensor-core code:
operands of a contraction are rounded to the kernel's dtype, everything accumulates in float32
(K10), and where the order of operations is a kernel's own choice (sums, contractions, the last bits
of a transcendental function) the result carries an error of random sign and of the size float32
allows.
The spread of a few such runs around the truth is what an honest kernel may be off by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from attnspec.conformance.dtypes import EPS, TINY, accumulator, round_to
from attnspec.reference.primitives.gelu import ERF

TRANSCENDENTAL = {
    np.exp, np.exp2, np.expm1, np.log, np.log2, np.log1p, np.tanh, np.sin, np.cos, np.sqrt,
    np.logaddexp, np.power, np.divide, np.reciprocal, np.arctan, np.cosh, np.sinh, np.float_power,
    ERF,
}  # fmt: skip
EXPONENT = np.int64(0x7FF0000000000000)
LEAST_NORMAL = float(np.finfo(np.float32).tiny)
CONTRACTIONS: dict[Callable[..., Any], str] = {
    np.einsum: "einsum",
    np.dot: "dot",
    np.tensordot: "tensordot",
    np.inner: "inner",
    np.vdot: "vdot",
    np.outer: "outer",
}


SUMS = {np.sum, np.mean, np.cumsum}
ADDITIONS = ("reduce", "accumulate", "reduceat")
POOL = 1024
"""Random numbers are drawn by so many at least: arrays are small, and each call costs as much."""
SORTED = 2**16
"""Equal entries of at most so many are found by sorting; among more, by a hash."""


class Model:
    """The arithmetic being simulated and the source of its random signs."""

    def __init__(self, dtype: str, generator: np.random.Generator, alike: bool = False) -> None:
        self.dtype = dtype
        self.generator = generator
        self.alike = alike
        self.compute = np.dtype(accumulator(dtype))
        self.unit = EPS[accumulator(dtype)]
        # Hardware may take a subnormal number for 0.
        self.least = LEAST_NORMAL if alike and self.compute == np.float32 else 0.0
        self._pools: dict[tuple[float, float], np.ndarray] = {}

    def operand(self, x: np.ndarray) -> np.ndarray:
        """`x` as an operand of a contraction: entries the dtype lacks are off, at most half a unit.

        Which way they fall is a kernel's choice too, since it may scale them before it rounds. No
        error is near 0, or a row of one entry would have next to no budget. If they are `alike`,
        equal entries fall the same way, as in a kernel; where many are equal that does not average
        out.
        """
        if self.dtype == self.compute.name:
            return x.astype(self.compute, copy=False).astype(np.float64, copy=False)
        nearest = round_to(x, self.dtype).astype(np.float64)
        inside = (nearest != x) & np.isfinite(nearest)
        if not inside.any():
            return nearest
        # An entry's power of 2 is its exponent without the rest of its bits. All in place: operands
        # may be the states of all tokens.
        fallen = (nearest.view(np.int64) & EXPONENT).view(np.float64)
        fallen *= EPS[self.dtype]
        # What is too small for the dtype falls to 0, whose unit is the smallest there is.
        np.maximum(fallen, TINY[self.dtype], out=fallen)
        fallen *= self._fall(x)
        fallen += x
        np.copyto(nearest, fallen, where=inside)
        return nearest

    def _fall(self, x: np.ndarray) -> np.ndarray:
        """Where entries fall, in units: 0.15 to 0.4 up or down, as large in the mean as uniform."""
        if not self.alike:
            return self._signed(0.15, 0.4, x.shape)
        if x.size > SORTED:
            return self._signed(0.15, 0.4, (SORTED,))[self._hash(x)]
        values, place = np.unique(x, return_inverse=True)
        return self._signed(0.15, 0.4, values.shape)[place].reshape(x.shape)

    def _hash(self, x: np.ndarray) -> np.ndarray:
        """16 bits for each float32 number under a key of this call: MurmurHash3's last step."""
        bits = np.array(x, np.float32).view(np.uint32)
        bits ^= self.generator.integers(2**32, dtype=np.uint32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            bits ^= bits >> np.uint32(shift)
            bits *= np.uint32(factor)
        return bits >> np.uint32(16)

    def _signed(self, least: float, most: float, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of a random sign, between `least` and `most` in size. Not to be written to."""
        count = math.prod(shape)
        pool = self._pools.get((least, most))
        if pool is None or pool.size < count:
            pool = self.generator.uniform(least - most, most - least, max(count, POOL))
            pool += np.copysign(least, pool)
        self._pools[least, most] = pool[count:]
        return pool[:count].reshape(shape)

    def disturb(self, exact: Any, size: Any) -> np.ndarray:
        """`exact` off by about one unit of accumulation error relative to `size`, sign at random.

        Errors of one size would cancel too often where a result hangs on the difference of two.
        """
        errors = self._signed(0.5 * self.unit, 1.5 * self.unit, np.shape(exact))
        result = np.asarray(exact + errors * np.where(np.isfinite(size), size, 0.0))
        result = result.astype(self.compute, copy=False)
        if self.least:
            result *= np.abs(result) >= self.least
        return result


_model: ContextVar[Model] = ContextVar("model")


@contextmanager
def rounded_arithmetic(dtype: str, seed: int, alike: bool = False) -> Iterator[None]:
    """Within this context `Rounded` arrays compute as a kernel of `dtype` does."""
    token = _model.set(Model(dtype, np.random.default_rng(seed), alike))
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    finally:
        _model.reset(token)


class Rounded(np.ndarray):
    """A float array of the accumulator dtype that computes under the current `Model`."""

    @classmethod
    def wrap(cls, x: Any) -> Any:
        """Float arrays become `Rounded`; anything else passes through."""
        if isinstance(x, np.floating):
            x = np.asarray(x)
        elif not isinstance(x, np.ndarray):
            return x
        kind, compute = x.dtype, _model.get().compute
        if kind is compute:
            return x.view(cls)
        return x.astype(compute).view(cls) if kind.kind == "f" else x

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any
    ) -> Any:
        plain = [_strip(x) for x in inputs]
        called = method == "__call__"
        if called and ufunc is np.matmul:
            return _contract(np.matmul, plain, kwargs)
        if out is not None:
            kwargs["out"] = tuple(_strip(x) for x in out)
        result = ufunc(*plain, **kwargs) if called else getattr(ufunc, method)(*plain, **kwargs)
        if isinstance(result, np.ndarray) and result.dtype.kind == "O":
            # From a ufunc made of a Python function, as `ERF` is.
            result = result.astype(np.float64)
        if called:
            if ufunc in TRANSCENDENTAL and _is_float(result):
                result = _model.get().disturb(result, np.abs(result))
            elif ufunc is np.subtract and _is_float(result):
                # A kernel that works in base 2 rescales both sides first, and rounds each.
                size = np.maximum(np.abs(plain[0]), np.abs(plain[1]))
                result = _model.get().disturb(result, size)
        elif ufunc is np.add and method in ADDITIONS and _is_float(result):
            size = getattr(ufunc, method)(np.abs(plain[0]), *plain[1:], **_no_out(kwargs))
            result = _model.get().disturb(result, size)
        if out is not None:
            out[0][...] = result
            return out[0]
        return _wrap_tree(result) if type(result) is tuple else Rounded.wrap(result)

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> Any:
        if func in CONTRACTIONS:
            return _contract(func, [_strip_tree(x) for x in args], _strip_tree(kwargs))
        plain = [_strip_tree(x) for x in args]
        named = {name: _strip_tree(x) for name, x in kwargs.items()}
        result = func(*plain, **named)
        if func in SUMS and "out" not in named:
            if not _is_float(result):
                return result
            size = func(np.abs(plain[0]), *plain[1:], **named)
            result = _model.get().disturb(result, size)
        return _wrap_tree(result)


def _contract(function: Callable[..., Any], operands: list[Any], kwargs: dict[str, Any]) -> Any:
    """A contraction on rounded operands, exact but for its accumulation error.

    That is one unit, or, where a kernel may add many terms one after the other, the standard
    deviation of as many roundings: each is uniform within half a unit of the sum so far.
    """
    model = _model.get()
    exact_operands = [model.operand(np.asarray(x)) if _is_float(x) else x for x in operands]
    exact = function(*exact_operands, **kwargs)
    size = function(*[np.abs(x) if _is_float(x) else x for x in exact_operands], **kwargs)
    if not _is_float(exact):
        return exact
    if function is np.matmul:
        size = max(1.0, math.sqrt(operands[0].shape[-1] / 12)) * size
    return Rounded.wrap(model.disturb(exact, size))


def _no_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "out"}


def _is_float(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.floating)) and x.dtype.kind == "f"


def _strip(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _strip_tree(x: Any) -> Any:
    if isinstance(x, Rounded):
        return x.view(np.ndarray)
    if isinstance(x, (list, tuple)):
        return _rebuild(x, [_strip_tree(item) for item in x])
    if isinstance(x, dict):
        return {name: _strip_tree(item) for name, item in x.items()}
    return x


def _wrap_tree(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return _rebuild(x, [_wrap_tree(item) for item in x])
    return Rounded.wrap(x)


def _rebuild(like: Any, items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
