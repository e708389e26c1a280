"""A driver of Triton that compiles and runs nothing, and a journal of what is launched on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from attnspec.fast import backend

Launch = tuple[str, str, list[Any]]
"""A kernel's name, how it was launched ("looked up" by Triton, or "direct"), its arguments."""


class Kernel:
    """A compiled kernel that notes the arguments it is launched with."""

    module = "loaded"
    function = packed_metadata = None

    def __init__(self, name: str, journal: list[Launch]) -> None:
        self.name, self.journal = name, journal

    def launch_metadata(self, *call: Any) -> None:
        return None

    def run(self, *call: Any) -> None:
        self.journal.append((self.name, "looked up", [plain(x) for x in call[9:]]))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *call, stream=None: self.journal.append(
            (self.name, "direct", [plain(x) for x in call])
        )


def plain(x: Any) -> Any:
    """An argument as a number: addresses of tensors, and those of descriptors with their layout."""
    if hasattr(x, "base"):
        layout = x.shape, x.strides, x.block_shape, x.padding
        return plain(x.base), *(list(part) for part in layout)
    return x.data_ptr() if isinstance(x, Tensor) else x


class Journal(list[Launch]):
    """The launches, and how often something was compiled."""

    compiled = 0


@contextmanager
def launches(
    monkeypatch: pytest.MonkeyPatch, kernels: Sequence[JITFunction[Any]], *caches: dict[Any, Any]
) -> Iterator[Journal]:
    """What is launched inside the block; `caches` forget before and after it what they keep, and
    `kernels` what they compiled.
    """
    found = Journal()

    def do_compile(function: Any, key: Any, signature: Any, device: Any, *rest: Any) -> Kernel:
        found.compiled += 1
        kernel = function.device_caches[device][0][key] = Kernel(function.__name__, found)
        return kernel

    driver = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    forgetful = (*caches, *(kernel.device_caches for kernel in kernels))
    for cache in forgetful:
        cache.clear()
    yield found
    for cache in forgetful:
        cache.clear()
