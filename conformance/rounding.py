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
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnspec.conformance.dtypes import EPS, TINY, accumulator, round_to
from attnspec.reference.primitives.gelu import ERF

TRANSCENDENTAL = {
    np.exp, np.exp2, np.expm1, np.log, np.log2, np.log1p, np.tanh, np.sin, np.cos, np.sqrt,
    np.logaddexp, np.power, np.divide, np.reciprocal, np.arctan, np.cosh, np.sinh, np.float_power,
    ERF,
}  # fmt: skip
CONTRACTIONS: dict[Callable[..., Any], str] = {
    np.einsum: "einsum",
    np.dot: "dot",
    np.tensordot: "tensordot",
    np.inner: "inner",
    np.vdot: "vdot",
    np.outer: "outer",
}


@dataclass(frozen=True)
class Model:
    """The arithmetic being simulated and the source of its random signs."""

    dtype: str
    generator: np.random.Generator
    alike: bool = False

    @property
    def compute(self) -> str:
        return accumulator(self.dtype)

    def operand(self, x: np.ndarray) -> np.ndarray:
        """`x` as an operand of a contraction: entries the dtype lacks are off, at most half a unit.

        Which way they fall is a kernel's choice too, since it may scale them before it rounds. No
        error is near 0, or a row of one entry would have next to no budget. If they are `alike`,
        equal entries fall the same way, as in a kernel; where many are equal that does not average
        out.
        """
        nearest = round_to(x, self.dtype).astype(np.float64)
        if self.dtype == self.compute:
            return nearest
        unit = np.maximum(np.ldexp(EPS[self.dtype], np.frexp(nearest)[1] - 1), TINY[self.dtype])
        with np.errstate(invalid="ignore"):
            inside = (nearest != x) & np.isfinite(nearest)
            return np.where(inside, x + self._fall(x) * unit, nearest)

    def _fall(self, x: np.ndarray) -> np.ndarray:
        """Where entries fall, in units: 0.15 to 0.4 up or down, as large in the mean as uniform."""
        if self.alike:
            values, place = np.unique(x, return_inverse=True)
            return self._signed(0.15, 0.4, values.shape)[place].reshape(x.shape)
        return self._signed(0.15, 0.4, x.shape)

    def _signed(self, least: float, most: float, shape: tuple[int, ...]) -> np.ndarray:
        """Numbers of a random sign, between `least` and `most` in size."""
        random = self.generator.uniform(least - most, most - least, shape)
        return np.copysign(least + np.abs(random), random)

    def disturb(self, exact: np.ndarray, size: np.ndarray) -> np.ndarray:
        """`exact` off by about one unit of accumulation error relative to `size`, sign at random.

        Errors of one size would cancel too often where a result hangs on the difference of two.
        """
        error = np.where(np.isfinite(size), EPS[self.compute] * size, 0.0)
        with np.errstate(over="ignore"):
            result = exact + self._signed(0.5, 1.5, np.shape(exact)) * error
            result = np.asarray(result).astype(self.compute)
        if self.alike and self.compute == "float32":
            # Hardware may take a subnormal number for 0.
            return np.where(np.abs(result) < np.finfo(np.float32).tiny, result * 0, result)
        return result


_model: ContextVar[Model] = ContextVar("model")


@contextmanager
def rounded_arithmetic(dtype: str, seed: int, alike: bool = False) -> Iterator[None]:
    """Within this context `Rounded` arrays compute as a kernel of `dtype` does."""
    token = _model.set(Model(dtype, np.random.default_rng(seed), alike))
    try:
        yield
    finally:
        _model.reset(token)


class Rounded(np.ndarray):
    """A float array of the accumulator dtype that computes under the current `Model`."""

    @classmethod
    def wrap(cls, x: Any) -> Any:
        """Float arrays become `Rounded`; anything else passes through."""
        if isinstance(x, (np.ndarray, np.floating)) and np.asarray(x).dtype.kind == "f":
            return np.asarray(x).astype(_model.get().compute).view(cls)
        return x

    def __array_ufunc__(
        self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **kwargs: Any
    ) -> Any:
        plain = [_strip(x) for x in inputs]
        if ufunc is np.matmul and method == "__call__":
            return _contract(np.matmul, plain, kwargs)
        if out is not None:
            kwargs["out"] = tuple(_strip(x) for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if isinstance(result, np.ndarray) and result.dtype.kind == "O":
            # From a ufunc made of a Python function, as `ERF` is.
            result = result.astype(np.float64)
        if method == "__call__" and ufunc in TRANSCENDENTAL and _is_float(result):
            result = _model.get().disturb(result, np.abs(result))
        if ufunc is np.subtract and method == "__call__" and _is_float(result):
            # A kernel that works in base 2 rescales both sides first, and rounds each.
            result = _model.get().disturb(result, np.maximum(np.abs(plain[0]), np.abs(plain[1])))
        if method in ("reduce", "accumulate", "reduceat") and ufunc is np.add and _is_float(result):
            size = getattr(ufunc, method)(np.abs(plain[0]), *plain[1:], **_no_out(kwargs))
            result = _model.get().disturb(result, size)
        if out is not None:
            out[0][...] = result
            return out[0]
        return _wrap_tree(result)

    def __array_function__(
        self, func: Callable[..., Any], types: Any, args: Any, kwargs: Any
    ) -> Any:
        if func in CONTRACTIONS:
            return _contract(func, [_strip_tree(x) for x in args], _strip_tree(kwargs))
        if func in (np.sum, np.mean, np.cumsum) and "out" not in kwargs:
            array = args[0]
            result = func(*_strip_tree(args), **_strip_tree(kwargs))
            if not _is_float(result):
                return result
            size = func(np.abs(_strip(array)), *_strip_tree(args[1:]), **_strip_tree(kwargs))
            return Rounded.wrap(_model.get().disturb(result, size))
        return _wrap_tree(func(*_strip_tree(args), **_strip_tree(kwargs)))


def _contract(function: Callable[..., Any], operands: list[Any], kwargs: dict[str, Any]) -> Any:
    """A contraction on rounded operands, exact but for its accumulation error.

    That is one unit, or, where a kernel may add many terms one after the other, the standard
    deviation of as many roundings: each is uniform within half a unit of the sum so far.
    """
    model = _model.get()
    exact_operands = [model.operand(np.asarray(x)) if _is_float(x) else x for x in operands]
    with np.errstate(invalid="ignore", over="ignore"):
        exact = function(*exact_operands, **kwargs)
        size = function(*[np.abs(x) if _is_float(x) else x for x in exact_operands], **kwargs)
    if not _is_float(exact):
        return exact
    terms = operands[0].shape[-1] if function is np.matmul else 1
    return Rounded.wrap(model.disturb(exact, max(1.0, math.sqrt(terms / 12)) * size))


def _no_out(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "out"}


def _is_float(x: Any) -> bool:
    return isinstance(x, (np.ndarray, np.floating)) and np.asarray(x).dtype.kind == "f"


def _strip(x: Any) -> Any:
    return x.view(np.ndarray) if isinstance(x, Rounded) else x


def _strip_tree(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return _rebuild(x, [_strip_tree(item) for item in x])
    if isinstance(x, dict):
        return {name: _strip_tree(item) for name, item in x.items()}
    return _strip(x)


def _wrap_tree(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return _rebuild(x, [_wrap_tree(item) for item in x])
    return Rounded.wrap(x)


def _rebuild(like: Any, items: list[Any]) -> Any:
    return type(like)(*items) if hasattr(like, "_fields") else type(like)(items)
