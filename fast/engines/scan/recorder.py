"""The launches of a call, recorded to be replayed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

from attnspec.fast.engines.descriptors import described
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan import replay


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
        or a result is neither input nor buffer, or two inputs are one. The interpreter compiles no
        kernel, and nothing is kept.
        """
        given = [x for x in (*tensors, *self.buffers) if x is not None]
        slots = {id(x): slot for slot, x in enumerate((*tensors, *self.buffers)) if x is not None}
        if len(slots) < len(given) or any(id(x) not in slots for x in outputs):
            return
        launches: list[replay.Launch] = []
        for compiled, programs, arguments in self.launches:
            hows = [described(x) for x in arguments]
            bases = [x if how is None else x.base for x, how in zip(arguments, hows, strict=True)]
            given_at = [(n, id(x)) for n, x in enumerate(bases) if isinstance(x, Tensor)]
            if compiled is None or any(x not in slots for _, x in given_at):
                return
            places = [(n, slots[x], hows[n]) for n, x in given_at]
            constants = [None if isinstance(x, Tensor) else x for x in bases]
            launches.append((compiled[programs, 1, 1], constants, places))
        buffers = [(tuple(x.shape), x.dtype) for x in self.buffers]
        replay.replays[key] = replay.Replay(
            buffers, launches, tuple(slots[id(x)] for x in outputs), prepare
        )
