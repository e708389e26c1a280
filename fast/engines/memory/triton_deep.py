"""Launches for a memory of two layers: groups of pieces, in each one piece after the other, and
then all that the group's queries read.

Inputs, states and scratch are float32, and all widths are padded to multiples of 16 with zeros,
which stay zeros: kernels are compiled for fewer widths, and read whole words. Only the states that
enter a group are kept for the gradient, as in `dense`. As there, packed sequences follow one
another, and where one begins, its first states take the place of those the one before has left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.memory.configs import MemoryConfig, deep_config, least_side
from attnspec.fast.engines.memory.dense import GROUP
from attnspec.fast.engines.memory.packed import Ends
from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars
from attnspec.fast.engines.memory.triton_deep_walk import begin_kernel, read_kernel, step_kernel
from attnspec.fast.engines.memory.triton_scalars import scalars
from attnspec.fast.engines.prepared import Repeated
from attnspec.fast.engines.sizes import cdiv, next_power_of_2


def padded(n: int) -> int:
    return 16 * cdiv(n, 16)


def in_rows(x: Tensor) -> Tensor:
    """x (batch, heads, tokens, width) as float32 (heads, tokens, padded width)."""
    width = x.shape[3]
    if x.dtype == torch.float32 and x.is_contiguous() and width % 16 == 0 and not x.data_ptr() % 16:
        return x.flatten(0, 1)
    copy = torch.empty(*x.shape[:3], padded(width), dtype=torch.float32, device=x.device)
    copy[..., :width].copy_(x)
    copy[..., width:].zero_()
    return copy.flatten(0, 1)


@dataclass
class Two:
    """One call: its layer widths, as given and padded, pieces, inputs in rows, coefficients and
    configuration.
    """

    given: Sequence[int]
    widths: tuple[int, int, int]
    pieces: Pieces
    k: Tensor
    v: Tensor
    q: Tensor
    of: Scalars
    loss_scale: float
    precision: str
    least: int
    cfg: MemoryConfig

    @classmethod
    def of_inputs(
        cls, widths: Sequence[int], pieces: Pieces, k: Tensor, v: Tensor, q: Tensor, rates: Rates,
        loss_scale: float, before: bool,
    ) -> Two:  # fmt: skip
        hopper = k.is_cuda and torch.cuda.get_device_properties(k.device).major >= 9
        wide = k.element_size() >= 4
        cfg = deep_config(k.element_size(), hopper, max(widths[0], widths[2]))
        d, hidden, dv = map(padded, widths)
        return cls(
            widths, (d, hidden, dv), pieces, in_rows(k), in_rows(v), in_rows(q),
            scalars(rates, pieces, before), loss_scale, "ieee" if wide else "tf32",
            least_side(k.element_size()), cfg,
        )  # fmt: skip

    @property
    def memories(self) -> int:
        return self.k.shape[0]

    @property
    def group(self) -> int:
        return self.q.shape[0] // max(1, self.memories)

    def tile(self, width: int) -> int:
        """A side of a tile that holds so many channels."""
        return max(self.least, next_power_of_2(width))

    @property
    def hidden(self) -> int:
        """Hidden channels that a program owns."""
        return min(self.cfg.deep_tile, self.tile(self.widths[1]))

    @property
    def reading(self) -> int:
        """As many for kernels that go through them all."""
        return min(self.cfg.deep_read, self.tile(self.widths[1]))

    @property
    def tiles(self) -> int:
        return cdiv(self.widths[1], self.hidden)

    @property
    def groups(self) -> int:
        return cdiv(self.pieces.count, GROUP)

    def many(self, number: int) -> int:
        """Pieces of a group."""
        return min(GROUP, self.pieces.count - number * GROUP)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.k.device)

    @property
    def numbers(self) -> int:
        """Numbers of a state."""
        d, hidden, dv = self.widths
        return hidden * (d + dv)

    def states(self, slots: int) -> Tensor:
        return self.empty(slots, self.memories, self.numbers)

    def columns(self, slots: int, width: int) -> Tensor:
        """Scratch for the tokens of pieces, which are columns."""
        return self.empty(slots, self.memories, width, self.pieces.size)

    def output(self, like: Tensor, width: int) -> Tensor:
        """Room for (batch, heads, tokens, padded width) in the dtype of `like`."""
        return torch.empty(*like.shape[:3], padded(width), dtype=like.dtype, device=like.device)

    def spread(self, state: Tensor) -> Tensor:
        """A state (memories, numbers) with padded widths."""
        if state.shape[1] == self.numbers:
            return state
        out = state.new_zeros(state.shape[0], self.numbers)
        d, hidden, dv = self.given
        first, second = self._layers(out, self.widths)
        given = self._layers(state, self.given)
        first[:, :d, :hidden].copy_(given[0])
        second[:, :hidden, :dv].copy_(given[1])
        return out

    def packed(self, state: Tensor) -> Tensor:
        """The inverse of `spread`; always a copy."""
        d, hidden, dv = self.given
        first, second = self._layers(state, self.widths)
        return torch.cat([first[:, :d, :hidden].flatten(1), second[:, :hidden, :dv].flatten(1)], 1)

    def _layers(self, state: Tensor, widths: Sequence[int]) -> tuple[Tensor, Tensor]:
        d, hidden, dv = widths
        first, second = state.split([d * hidden, hidden * dv], 1)
        return first.unflatten(1, (d, hidden)), second.unflatten(1, (hidden, dv))

    def ends(self, *states: Tensor) -> list[Ends]:
        """Those of packed sequences, if there are any."""
        return [] if self.pieces.packed is None else [Ends(x, self.memories) for x in states]

    def handed(self, sequences: Sequence[Ends]) -> dict[str, Tensor]:
        """Where kernels that go piece by piece find both ends of sequences, if there are any."""
        both = [x for name in ("given", "kept") for x in (getattr(e, name) for e in sequences)]
        names = ("given_W", "given_S", "kept_W", "kept_S")
        return dict(zip(names, both or [self.k] * 4, strict=True))

    def place(self) -> dict[str, Any]:
        p = self.pieces
        return {
            "first": 0, "cuts": p.table(self.k), "tokens": p.tokens, "b": p.b, "per": p.per,
            "count": p.count, "size": p.size, "memories": self.memories,
            "PACKED": p.packed is not None,
        }  # fmt: skip

    def owning(self) -> dict[str, Any]:
        """Options of kernels whose programs own hidden channels."""
        return self._options(1, self.hidden)

    def going_through(self) -> dict[str, Any]:
        """Options of kernels that go through all hidden channels, and how many there are.

        That number is no constant: a loop of one turn would be none, and from such code ptxas 12.8
        has made descriptors of shared memory of a register that it had never written.
        """
        return self._options(self.cfg.deep_stages, self.reading) | {"hidden": self.widths[1]}

    def _options(self, stages: int, hidden: int) -> dict[str, Any]:
        d, width, dv = self.widths
        return {
            "D": d, "DV": dv, "HIDDEN": width, "BD": self.tile(d), "BV": self.tile(dv),
            "BH": hidden, "C": self.pieces.size, "PRECISION": self.precision,
            "num_warps": self.cfg.deep_warps, "num_stages": stages,
        }  # fmt: skip


class Group:
    """Scratch of a group of pieces, and the launches that fill it. W and S are the first states."""

    def __init__(self, call: Two, W: Tensor, S: Tensor) -> None:
        _, hidden, dv = call.widths
        slots = min(GROUP, call.pieces.count)
        self.call, self.long = call, call.pieces.per > 1
        self.first, self.sequences = (W, S), call.ends(W, S)
        self.W, self.S = call.states(slots + 2), call.states(slots + 1)
        self.Z, self.H, self.D1 = (call.columns(slots, hidden) for _ in range(3))
        self.D2 = call.columns(slots, dv)
        of, programs, place = call.of, call.memories * call.tiles, call.place()
        options = call.owning()
        parts = call.empty(2, call.memories, call.tiles, dv, call.pieces.size)
        self._begin = Repeated(
            begin_kernel, programs, k=call.k, W=self.W, Z=self.Z, H=self.H, parts=parts,
            **place, **options,
        )  # fmt: skip
        self._step = Repeated(
            step_kernel, programs, i=0, k=call.k, v=call.v, W=self.W, S=self.S, Z=self.Z, H=self.H,
            D1=self.D1, D2=self.D2, parts=parts, end=of.end, end_n=of.end_n, end_G=of.end_G,
            many=slots, loss_scale=call.loss_scale, LONG=self.long, **call.handed(self.sequences),
            **place, **options,
        )  # fmt: skip

    def enter(self, W: Tensor, S: Tensor, base: Tensor | None = None) -> None:
        """States before a group's first piece, and its base if the chunk is older than the group.
        All may be slots of this group.
        """
        if base is not None:
            self.W[0].copy_(base)
        self.W[1].copy_(W)
        self.S[0].copy_(S)

    def begin(self) -> tuple[Tensor, Tensor]:
        """W and S before the first piece."""
        W, S = self.first
        packed = self.call.pieces.packed
        if packed is not None:
            W, S = (ends.enter(packed.begins(0), self.S[0]) for ends in self.sequences)
        return W, S

    def walk(self, number: int) -> None:
        """Group `number`, from the states that `enter` set."""
        first, many = number * GROUP, self.call.many(number)
        self._begin(first=first)
        for i in range(many):
            self._step(first=first, i=i, many=many)

    def base_behind(self, number: int) -> Tensor | None:
        """The base of the piece behind a group, if chunks have pieces and there is such a piece."""
        behind, p = (number + 1) * GROUP, self.call.pieces
        if not self.long or behind >= p.count:
            return None
        if p.packed is None:
            return self.W[max(0, GROUP + 1 - behind % p.per)]
        slot = (GROUP + 1 - p.packed.table[behind, 2:3]).clamp(min=0)
        return self.W.index_select(0, slot)[0]


def forward(
    widths: Sequence[int], pieces: Pieces, W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor,
    rates: Rates, loss_scale: float, before: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last W and S (memories, numbers), and the states that enter groups if `keep`:
    (groups, 3 or 2, heads, padded numbers), W, S and, if chunks have pieces, the base.
    """
    call = Two.of_inputs(widths, pieces, k, v, q, rates, loss_scale, before)
    y = call.output(q, widths[2])
    saved = W.new_empty(0)
    if not call.memories or not pieces.count:
        return y[..., : widths[2]].contiguous(), W.clone(), S.clone(), saved
    if keep:
        kinds = 3 if pieces.per > 1 else 2
        saved = call.empty(call.groups, kinds, call.memories, call.numbers)
    group = Group(call, call.spread(W), call.spread(S))
    last_W, last_S = group.begin()
    read = Repeated(
        read_kernel, 0, k=call.k, q=call.q, W=group.W, S=group.S, H=group.H, D1=group.D1,
        D2=group.D2, rows=call.of.rows, G=call.of.G, y=y, many=0, group=call.group, **call.place(),
        **call.going_through(),
    )  # fmt: skip
    base = last_W if group.long else None
    for number in range(call.groups):
        group.enter(last_W, last_S, base)
        if keep:
            entering = (group.W[1], group.S[0], group.W[0])
            for place, x in zip(saved[number], entering, strict=False):
                place.copy_(x)
        group.walk(number)
        many = call.many(number)
        read(call.memories * call.group * many, first=number * GROUP, many=many)
        last_W, last_S = group.W[many + 1], group.S[many]
        base = group.base_behind(number)
    y = y[..., : widths[2]].contiguous()
    if group.sequences:
        last_W, last_S = (ends.left for ends in group.sequences)
    return y, call.packed(last_W), call.packed(last_S), saved
