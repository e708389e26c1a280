"""Launches of one kind of call, kept to be repeated.

Planning a call and looking up its kernels costs more host time than a short sequence takes on the
device. Both depend on shapes, strides, dtypes, alignment and options alone, so a call whose kind is
known allocates its buffers and hands addresses to compiled kernels, and does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import TABLE
from attnspec.fast.recent import Recent

_replays: Recent[Hashable, Replay] = Recent()


def kind(tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> Hashable:
    """What checks and launches of a call depend on, which is all but addresses and values."""
    parts = [
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() & 15)
        for x in tensors
    ]
    return (*parts, *options, *map(type, options), TABLE.state())


def known(key: Hashable) -> Replay | None:
    """The launches of this kind of call; an option without a hash is wrong, as its check tells."""
    try:
        return _replays.get(key)
    except TypeError:
        return None


def alias(key: Hashable, other: Hashable) -> None:
    """Find under `key` what is kept under `other`, if anything."""
    if other in _replays:
        _replays[key] = _replays[other]


class Replay:
    """Launches as recorded: buffers to allocate, and for each kernel the arguments that are tensors
    by their place among inputs and buffers.
    """

    def __init__(
        self, buffers: list[tuple[tuple[int, ...], torch.dtype]],
        launches: list[tuple[Any, tuple[int, int, int], list[Any], list[tuple[int, int]]]],
        outputs: tuple[int, ...], prepare: Callable[[], None],
    ) -> None:  # fmt: skip
        self.buffers = buffers
        self.launches = launches
        self.outputs = outputs
        self.prepare = prepare

    def __call__(self, tensors: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        first = tensors[0]
        assert first is not None
        with torch.cuda.device_of(first):
            self.prepare()
            slots = list(tensors)
            for shape, dtype in self.buffers:
                slots.append(torch.empty(shape, dtype=dtype, device=first.device))
            for compiled, grid, constants, places in self.launches:
                arguments = constants.copy()
                for place, slot in places:
                    arguments[place] = slots[slot]
                count_launch()
                compiled[grid](*arguments)
        return tuple(x for slot in self.outputs if (x := slots[slot]) is not None)


class Recorder:
    """Launches kernels, and follows the buffers and launches of a call if it `follows`."""

    def __init__(self, follows: bool = False) -> None:
        self.follows = follows
        self.buffers: list[Tensor] = []
        self.launches: list[tuple[Any, int, list[Any]]] = []

    def launch(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch a Triton kernel on `programs` programs."""
        compiled = launch(kernel, programs, *arguments, **constants)
        if not self.follows or not programs:
            return
        rest = [constants[name] for name in kernel.arg_names[len(arguments) :]]
        self.launches.append((compiled, programs, [*arguments, *rest]))

    def buffer(self, x: Tensor) -> Tensor:
        """`x`, which the call has allocated."""
        if self.follows:
            self.buffers.append(x)
        return x

    def keep(
        self, key: Hashable, tensors: Sequence[Tensor | None], outputs: Sequence[Tensor],
        prepare: Callable[[], None],
    ) -> None:  # fmt: skip
        """Keep the call's launches for its kind, unless it also did something else: then a tensor
        is neither input nor buffer, or two inputs are one. The interpreter compiles no kernel, and
        nothing is kept.
        """
        given = [x for x in (*tensors, *self.buffers) if x is not None]
        slots = {id(x): slot for slot, x in enumerate((*tensors, *self.buffers)) if x is not None}
        if len(slots) < len(given):
            return
        launches: list[tuple[Any, tuple[int, int, int], list[Any], list[tuple[int, int]]]] = []
        for compiled, programs, arguments in self.launches:
            given_at = [(n, id(x)) for n, x in enumerate(arguments) if isinstance(x, Tensor)]
            if compiled is None or any(x not in slots for _, x in given_at):
                return
            places = [(n, slots[x]) for n, x in given_at]
            constants = [None if isinstance(x, Tensor) else x for x in arguments]
            launches.append((compiled, (programs, 1, 1), constants, places))
        buffers = [(tuple(x.shape), x.dtype) for x in self.buffers]
        _replays[key] = Replay(buffers, launches, tuple(slots[id(x)] for x in outputs), prepare)
