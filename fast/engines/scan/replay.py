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
from attnspec.fast.engines.descriptors import Described, descriptor
from attnspec.fast.engines.scan.configs import TABLE
from attnspec.fast.recent import Recent

Launch = tuple[Callable[..., Any], list[Any], list[tuple[int, int, Described | None]]]
"""A compiled kernel, its arguments without tensors, and for each tensor its place among them and
among inputs and buffers, and what a descriptor says of it, if it is handed over as one.
"""

replays: Recent[Hashable, Replay] = Recent()
"""By kind of call; `recorder.py` fills it."""


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
        return replays.get(key)
    except TypeError:
        return None


def alias(key: Hashable, other: Hashable) -> None:
    """Find under `key` what is kept under `other`, if anything."""
    if other in replays:
        replays[key] = replays[other]


class Replay:
    """Launches as recorded: buffers to allocate, and for each kernel the arguments that are tensors
    by their place among inputs and buffers.
    """

    def __init__(
        self, buffers: list[tuple[tuple[int, ...], torch.dtype]], launches: list[Launch],
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
            for run, constants, places in self.launches:
                arguments = constants.copy()
                for place, slot, how in places:
                    x = slots[slot]
                    arguments[place] = x if how is None or x is None else descriptor(how, x)
                count_launch()
                run(*arguments)
        return tuple(x for slot in self.outputs if (x := slots[slot]) is not None)
