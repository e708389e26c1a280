"""Launches for the gradient of a memory of two layers: groups of pieces from the last to the first.

Each group is walked again from the states that entered it, then its reads are gone through, all at
once, and after them its pieces, one before the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.memory.dense import GROUP
from attnspec.fast.engines.memory.packed import Ends
from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars
from attnspec.fast.engines.memory.triton_deep import Group, Two, in_rows
from attnspec.fast.engines.memory.triton_deep_gradients import (
    begin_back_kernel,
    keys_back_kernel,
    step_back_kernel,
)
from attnspec.fast.engines.memory.triton_deep_reads import (
    queries_back_kernel,
    read_back_kernel,
    shares_kernel,
)
from attnspec.fast.engines.memory.triton_scalars import scalars_backward
from attnspec.fast.engines.prepared import Repeated


class Back:
    """Scratch of the way back through a group of pieces, results, and the launches."""

    def __init__(
        self, call: Two, group: Group, sequences: Sequence[Ends], dy: Tensor, dk: Tensor,
        dv: Tensor, dq: Tensor,
    ) -> None:  # fmt: skip
        p, slots, heads = call.pieces, group.H.shape[0], call.memories * call.group
        d, hidden, dv_width = call.widths
        self.call = call
        self.dW, self.dS = call.states(slots + 1), call.states(slots + 1)
        self.reads = {
            name: call.empty(slots, call.memories, call.group, *x.shape[2:])
            for name, x in (
                ("dW", self.dW), ("dS", self.dS), ("dH", group.H), ("dD1", group.D1),
                ("dD2", group.D2), ("dK", call.columns(0, d)),
            )
        }  # fmt: skip
        # One query head a memory: the shares are the sums.
        self.sums = {name: self._sum(x) for name, x in self.reads.items()}
        self.drows = call.empty(heads, p.count, 2, p.size, 2)
        self.dG = call.empty(heads, p.count, p.size, p.size)
        self.end = call.empty(call.memories, p.count, 3)
        self.end_n, self.end_G = (call.empty(call.memories, p.count, p.size) for _ in range(2))
        dD1, dback, dz = (call.columns(slots, hidden) for _ in range(3))
        parts = call.empty(2, call.memories, call.tiles, dv_width, p.size)
        of, programs, place = call.of, call.memories * call.tiles, call.place()
        W, Z, H, D1, D2 = group.W, group.Z, group.H, group.D1, group.D2
        walk, still = call.owning(), call.going_through()
        errors: dict[str, Any] = {
            "k": call.k, "W": W, "Z": Z, "H": H, "dW": self.dW, "dS": self.dS,
            "RD1": self.sums["dD1"], "dD1": dD1, "dback": dback, "parts": parts, "end_n": of.end_n,
            "end_G": of.end_G, "i": 0, **place,
        }  # fmt: skip
        self._begin = Repeated(begin_back_kernel, programs, **errors, **walk)
        dbase = torch.zeros_like(self.dW[0])
        self._step = Repeated(
            step_back_kernel, programs, D2=D2, dbase=dbase, RW=self.sums["dW"], RS=self.sums["dS"],
            RH=self.sums["dH"], RD2=self.sums["dD2"], dz=dz, dv=dv, end=of.end,
            loss_scale=call.loss_scale, LONG=p.per > 1, **call.handed(sequences), **errors, **walk,
        )  # fmt: skip
        self._keys = Repeated(
            keys_back_kernel, 0, k=call.k, W=W, S=group.S, H=H, D1=D1, D2=D2, dW=self.dW,
            dS=self.dS, RK=self.sums["dK"], dz=dz, dk=dk, dend=self.end, dend_n=self.end_n,
            dend_G=self.end_G, end_n=of.end_n, end_G=of.end_G, many=slots, **place, **still,
        )  # fmt: skip
        common: dict[str, Any] = {
            "q": call.q, "rows": of.rows, "many": slots, "group": call.group,
            "dA": call.empty(slots, heads, *H.shape[2:]), **place,
        }  # fmt: skip
        pairs = call.empty(slots, heads, 2, p.size, p.size)
        h, dy = call.empty(slots, heads, *H.shape[2:]), in_rows(dy)
        self._reads = Repeated(
            read_back_kernel, 0, k=call.k, dy=dy, W=W, S=group.S, H=H, D1=D1, D2=D2, G=of.G,
            pairs=pairs, h=h, drows=self.drows, dG=self.dG, dD2=self.reads["dD2"], **common,
            **still,
        )  # fmt: skip
        given = {name: self.reads[name] for name in ("dW", "dS", "dH", "dD1")}
        self._shares = Repeated(
            shares_kernel, 0, dy=dy, pairs=pairs, h=h, **given, **common, **walk
        )  # fmt: skip
        self._queries = Repeated(
            queries_back_kernel, 0, k=call.k, W=W, S=group.S, D1=D1, G=of.G, dq=dq,
            drows=self.drows, dG=self.dG, dK=self.reads["dK"], **common, **still,
        )  # fmt: skip

    def _sum(self, x: Tensor) -> Tensor:
        return x[:, :, 0] if self.call.group == 1 else x.new_empty(*x.shape[:2], *x.shape[3:])

    def walk(self, number: int) -> None:
        """Group `number`, whose gradients behind it are in the last slots of dW and dS."""
        call, first, many = self.call, number * GROUP, self.call.many(number)
        programs = call.memories * call.group * many
        self._reads(programs, first=first, many=many)
        self._shares(programs * call.tiles, first=first, many=many)
        self._queries(programs, first=first, many=many)
        if call.group > 1:
            for name, x in self.reads.items():
                torch.sum(x, 2, out=self.sums[name])
        self._begin(first=first, i=many - 1)
        for i in reversed(range(many)):
            self._step(first=first, i=i)
        self._keys(call.memories * many, first=first, many=many)

    def coefficients(self) -> Scalars:
        """The gradients of the coefficients."""
        by_memory = (self.call.memories, self.call.group)
        dbeta, df = self.drows.sum(2).unflatten(0, by_memory).sum(1).unbind(-1)
        return Scalars(
            torch.stack([dbeta, torch.zeros_like(df), df], -1), self.dG.new_empty(0),
            self.dG.unflatten(0, by_memory).sum(1), self.end, self.end_n, self.end_G,
        )  # fmt: skip


def backward(
    widths: Sequence[int], pieces: Pieces, dy: Tensor, dW: Tensor, dS: Tensor, saved: Tensor,
    W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, rates: Rates, loss_scale: float,
    before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dW, dS (memories, numbers), dk, dv, dq, and drates (3, heads, tokens)."""
    call = Two.of_inputs(widths, pieces, k, v, q, rates, loss_scale, before)
    dk, dv, dq = (call.output(x, x.shape[3]) for x in (k, v, q))
    if not call.memories or not pieces.count:
        dk, dv, dq = (torch.zeros_like(x) for x in (k, v, q))
        return dW.clone(), dS.clone(), dk, dv, dq, rates.theta.new_zeros(3, *rates.theta.shape)
    group = Group(call, call.spread(W), call.spread(S))
    last_dW, last_dS = call.spread(dW), call.spread(dS)
    sequences = call.ends(last_dW, last_dS)
    back = Back(call, group, sequences, dy, dk, dv, dq)
    if pieces.packed is not None:
        ends, nothing = pieces.packed.ends(pieces.count - 1), torch.zeros_like(back.dW[0])
        last_dW, last_dS = (x.enter(ends, nothing) for x in sequences)
    for number in reversed(range(call.groups)):
        many = call.many(number)
        group.enter(*saved[number])
        group.walk(number)
        back.dW[many].copy_(last_dW)
        back.dS[many].copy_(last_dS)
        back.walk(number)
        last_dW, last_dS = back.dW[0], back.dS[0]
    if sequences:
        last_dW, last_dS = (x.left for x in sequences)
    drates = scalars_backward(rates, pieces, before, back.coefficients())
    dk, dv, dq = (
        out[..., : x.shape[3]].contiguous() for out, x in ((dk, k), (dv, v), (dq, q))
    )  # fmt: skip
    return call.packed(last_dW), call.packed(last_dS), dk, dv, dq, drates
