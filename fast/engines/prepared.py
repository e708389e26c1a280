"""Kernel launches worked out once: later launches of their kind fill in the tensors and go.

Triton looks at every argument of every launch again, which takes the host longer than many kernels
run. `launch` compares the arguments with earlier ones; a `Prepared` launch, which does not even do
that, keeps what does not change. Both hand a compiled kernel its arguments themselves, and keep no
tensor alive.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.descriptors import described, descriptor
from attnspec.fast.recent import Recent

HANDS_ON_CONSTANTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)
"""Since 3.3 a compiled kernel takes the arguments of the source, constants included."""

NUMBERS = frozenset({int, float, bool, type(None)})
"""Most arguments are these, and are told from tensors at once."""

_compiled: Recent[Hashable, Any] = Recent()


def launch(kernel: Any, programs: int | tuple[int, int], /, *given: Any, **named: Any) -> Any:
    """Start `programs` programs, unless there are none; the compiled kernel, if it was compiled.

    The arguments are the kernel's, then Triton's options. What Triton would find out about those
    that it has seen before is not found out again.
    """
    grid = programs if isinstance(programs, tuple) else (programs,)
    if 0 in grid:
        return None
    count_launch()
    values = [*given, *(named.pop(name) for name in kernel.arg_names[len(given) :])]
    kinds: list[Any] = [id(kernel), *named.items(), *map(type, values)]
    addresses = 0
    for x in values:
        if type(x) in NUMBERS:
            kinds.append(x)
        elif isinstance(x, Tensor):
            addresses |= x.data_ptr()
            kinds += x.dtype, x.device
        elif isinstance(getattr(x, "base", None), Tensor):
            # A descriptor; Gluon's are of a class of their own, with the layout of a tile.
            addresses |= x.base.data_ptr()
            kinds += x.base.dtype, *x.shape, *x.strides, *x.block_shape, getattr(x, "layout", None)
        else:
            kinds.append(x)
    # Triton compiles for addresses at multiples of 16 apart from all others.
    key = None if addresses & 15 else tuple(kinds)
    known = None if key is None else _compiled.get(key)
    if known is not None:
        known[(*grid, 1, 1)[:3]](*values)
        return known
    compiled = kernel[grid](*values, **named)
    if key is not None and HANDS_ON_CONSTANTS and getattr(compiled, "module", None) is not None:
        _compiled[key] = compiled
    return compiled


class Prepared:
    """A kernel, its grid and its arguments, for tensors of one dtype and layout on one device.

    Tensors and descriptors among `arguments` say which of them change from launch to launch and
    how they lie; `options` are Triton's.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        arguments: dict[str, Any],
        device: torch.device,
        **options: int,
    ) -> None:
        self.kernel, self.device, self.options = kernel, device, options
        self.grid = (programs, 1, 1)
        self.descriptors = {
            name: how for name, x in arguments.items() if (how := described(x)) is not None
        }
        self.arguments = {
            name: None if isinstance(x, Tensor) or name in self.descriptors else x
            for name, x in arguments.items()
        }
        names = kernel.arg_names
        self.places = {name: names.index(name) for name in arguments}
        self.values = [self.arguments[name] for name in names]
        self.compiled: Any = None

    def __call__(self, **tensors: Tensor | None) -> None:
        """Launch with these tensors; those that are None, no kernel of this kind takes."""
        index = self.device.index
        if index is not None and index != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                self(**tensors)
            return
        if not self.grid[0]:
            return
        count_launch()
        values, addresses = self.values.copy(), 0
        for name, x in tensors.items():
            if x is not None:
                address = x.data_ptr()
                addresses |= address
                how = self.descriptors.get(name)
                values[self.places[name]] = address if how is None else descriptor(how, x)
        # Triton compiles for addresses at multiples of 16 apart from all others.
        plain = not addresses & 15
        if plain and self.compiled is not None:
            self.compiled(*values, stream=driver.active.get_current_stream(index))
            return
        given = {
            name: descriptor(self.descriptors[name], x) if name in self.descriptors else x
            for name, x in tensors.items()
            if x is not None
        }
        compiled = self.kernel[self.grid](**(self.arguments | given), **self.options)
        if plain and HANDS_ON_CONSTANTS and getattr(compiled, "module", None) is not None:
            self.compiled = compiled[self.grid]


class Repeated:
    """A launch of a call, to be repeated with other integers: nothing else is looked at again.

    `arguments` are the kernel's and Triton's options. The tensors must live as long as this does.
    """

    def __init__(self, kernel: Any, programs: int, /, **arguments: Any) -> None:
        self.kernel, self.programs = kernel, programs
        names = kernel.arg_names
        self.places = {name: at for at, name in enumerate(names)}
        self.values = [arguments.pop(name) for name in names]
        self.options = arguments
        self.addresses: list[Any] = []
        self.compiled: Any = None

    def __call__(self, programs: int | None = None, /, **integers: int) -> None:
        """Launch with these integers, on so many programs if it is not the usual number."""
        grid = (self.programs if programs is None else programs, 1, 1)
        if self.compiled is None or not grid[0]:
            values = self.values.copy()
            for name, x in integers.items():
                values[self.places[name]] = x
            compiled = launch(self.kernel, grid[0], *values, **self.options)
            if HANDS_ON_CONSTANTS and getattr(compiled, "module", None) is not None:
                self.compiled = compiled
                self.addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in values]
            return
        count_launch()
        for name, x in integers.items():
            self.addresses[self.places[name]] = x
        self.compiled[grid](*self.addresses)
