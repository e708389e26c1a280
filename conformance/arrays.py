"""Between the suite's NumPy arrays and a kernel's own: placing inputs, reading outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from attnspec.conformance.dtypes import round_to
from attnspec.conformance.layouts import Placement, place


class ArrayKind:
    """How one array library takes part in the suite."""

    def put(self, placement: Placement, dtype: str) -> Any:
        """The argument made of `placement`, float buffers converted to `dtype`."""
        raise NotImplementedError

    def get(self, x: Any) -> np.ndarray:
        """An output as a NumPy array (floats as float64, without loss), a list as a ragged one."""
        raise NotImplementedError

    def describe(self, x: Any) -> tuple[str, str]:
        """dtype and device of an output, by name."""
        raise NotImplementedError

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        """While active, uninitialised memory of the library is NaN: what is not written shows."""
        yield

    def is_array(self, x: Any) -> bool:
        raise NotImplementedError


class NumpyArrays(ArrayKind):
    """Arrays as they are; bfloat16 does not exist here."""

    def put(self, placement: Placement, dtype: str) -> np.ndarray:
        buffer = placement.buffer
        if buffer.dtype.kind == "f":
            if dtype == "bfloat16":
                raise TypeError("dtype: got bfloat16, expected a dtype NumPy has")
            buffer = buffer.astype(dtype)
        return np.lib.stride_tricks.as_strided(
            buffer[placement.start :],
            placement.shape,
            [stride * buffer.itemsize for stride in placement.strides],
        )

    def get(self, x: Any) -> np.ndarray:
        if isinstance(x, list):
            return ragged([self.get(row) for row in x])
        x = np.asarray(x)
        return x.astype(np.float64) if x.dtype.kind == "f" else x

    def describe(self, x: Any) -> tuple[str, str]:
        return np.asarray(x).dtype.name, "cpu"

    def is_array(self, x: Any) -> bool:
        return isinstance(x, (np.ndarray, np.generic))

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        def filled(allocate: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                x = allocate(*args, **kwargs)
                if x.dtype.kind == "f":
                    x.fill(np.nan)
                return x

            return call

        with _patched(np, {name: filled(getattr(np, name)) for name in ("empty", "empty_like")}):
            yield


@dataclass
class TorchArrays(ArrayKind):
    """torch tensors on `device`."""

    device: str = "cpu"

    def put(self, placement: Placement, dtype: str) -> Any:
        import torch

        buffer = torch.from_numpy(placement.buffer).to(self.device)
        if buffer.is_floating_point():
            buffer = buffer.to(getattr(torch, dtype))
        return buffer.as_strided(placement.shape, placement.strides, placement.start)

    def get(self, x: Any) -> np.ndarray:
        import torch

        if isinstance(x, list):
            return ragged([self.get(row) for row in x])
        if not isinstance(x, torch.Tensor):
            return np.asarray(x)
        x = x.detach()
        return (x.double() if x.is_floating_point() else x).cpu().numpy()

    def describe(self, x: Any) -> tuple[str, str]:
        return str(x.dtype).removeprefix("torch."), x.device.type

    def is_array(self, x: Any) -> bool:
        import torch

        return isinstance(x, torch.Tensor)

    @contextmanager
    def poisoned(self) -> Iterator[None]:
        import torch

        _load_compiler()

        def filled(allocate: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                x = allocate(*args, **kwargs)
                return x.fill_(float("nan")) if x.is_floating_point() and x.numel() else x

            return call

        names = ("empty", "empty_like", "empty_strided")
        with (
            _patched(torch, {name: filled(getattr(torch, name)) for name in names}),
            _patched(torch.Tensor, {"new_empty": filled(torch.Tensor.new_empty)}),
        ):
            yield


@cache
def _load_compiler() -> None:
    """From its first use on torch's compiler keeps a map of torch's functions: it must be of the
    true ones, or a kernel that is compiled later could not allocate.
    """
    import torch

    with suppress(RuntimeError):  # where there is no compiler
        torch.compile(lambda x: torch.empty_like(x), backend="eager")(torch.zeros(1))


@contextmanager
def _patched(owner: Any, replacements: Mapping[str, Any]) -> Iterator[None]:
    originals = {name: getattr(owner, name) for name in replacements}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


def flatten(result: Any) -> list[Any]:
    """Nested tuples (states) as one flat list, in order."""
    if isinstance(result, tuple):
        return [leaf for item in result for leaf in flatten(item)]
    if isinstance(result, dict):
        return [leaf for item in result.values() for leaf in flatten(item)]
    return [result]


def ragged(rows: list[np.ndarray]) -> np.ndarray:
    """Integer rows of different lengths as one array, filled up with the least integer there is."""
    longest = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), longest), np.iinfo(np.int64).min)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
    return padded


def array_kind(array: str, device: str) -> ArrayKind:
    """The adapter of a kernel's `array` ("numpy" or "torch") on `device`."""
    return TorchArrays(device) if array == "torch" else NumpyArrays()


def place_arguments(
    kind: ArrayKind, arguments: Mapping[str, Any], layout: str, dtype: str
) -> dict[str, Any]:
    """Every NumPy array among `arguments` placed and converted; the rest as it is.

    Nested containers of arrays (states) are placed too, contiguously.
    """

    def convert(value: Any, layout: str) -> Any:
        if isinstance(value, np.ndarray):
            return kind.put(
                place(value, layout if value.dtype.kind == "f" else "contiguous"), dtype
            )
        if isinstance(value, dict):
            return {name: convert(item, "contiguous") for name, item in value.items()}
        if isinstance(value, tuple):
            items = [convert(item, "contiguous") for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return {name: convert(value, layout) for name, value in arguments.items()}


def round_arguments(arguments: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The arguments as the kernel sees them, back in float64: truth is computed on these."""

    def convert(value: Any) -> Any:
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return round_to(value, dtype).astype(np.float64)
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        if isinstance(value, tuple):
            items = [convert(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        return value

    return {name: convert(value) for name, value in arguments.items()}
