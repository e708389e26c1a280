"""What the kernels of the memory that is read before it is written share: tiles, unit rows, powers
of the decay, and how a call is cut.

A program walks a segment of one kv head, C tokens at a time, and holds some columns of its state.
Decays are powers of a constant: their exponents are counts of real tokens, which are exact. Packed
sequences are cut one by one; what lies behind the end of one is zeros to its tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnspec.fast.engines.flash.triton_launch import access
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.configs import memory_config
from attnspec.fast.engines.scan.segments import cut
from attnspec.fast.engines.scan.triton_common import locate
from attnspec.fast.engines.scan.triton_plan import CONSTANT, device_of, prepare
from attnspec.fast.engines.scan.triton_states import chain_kernel
from attnspec.fast.engines.scan.triton_trace_rows import bits_lost, floored, real_rows
from attnspec.fast.engines.sizes import next_power_of_2, tile_width

VARYING = [
    "q_b", "q_h", "k_b", "k_h", "v_b", "v_h", "dy_b", "dy_h", "onto_b", "onto_h", "one_b",
    "one_h", "up_b", "up_h", "valid_b", "valid_t", "tokens", "length", "segments", "kv_heads",
    "eta", "bits", "scale",
]  # fmt: skip
"""Arguments of the kernels whose values never lead to another compilation."""
NARROWEST = 64
"""Channels of a tile of 16-bit numbers at least: its rows fill 128 bytes. ptxas 12.8 has made wrong
descriptors of tiles whose rows are shorter."""


@triton.jit
def opened(
    source, b, stop, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr, WIDTH: tl.constexpr,
    ACCESS: tl.constexpr,
):  # fmt: skip
    """`source` for `load_rows` of a program whose tokens end before `stop`: by a descriptor of its
    own if ACCESS is 3. The sizes are those of the tiles.
    """
    x, stride_b, stride_h, stride_t, stride_d, heads = source
    if ACCESS == 3:
        rows = tl.make_tensor_descriptor(
            x + b * stride_b, [heads, stop, WIDTH], [stride_h, stride_t, 1], [H, C, W]
        )
        return (rows, stride_b, stride_h, stride_t, stride_d, heads)
    else:
        return source


@triton.jit
def load_rows(
    source, b, h, first, stop, column, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    WIDTH: tl.constexpr, ACCESS: tl.constexpr,
):  # fmt: skip
    """Tokens first .. first + C - 1 of H heads from h on, and W of their WIDTH channels from
    `column` on: a tile (H C, W), zeros from token `stop` on and behind the last channel. `source`
    is (x, the four strides of x, its heads), and ACCESS says what x is: as flash's `load_rows` has
    it, or 3 for a descriptor of the program's own batch, see `opened`.
    """
    x, stride_b, stride_h, stride_t, stride_d, _heads = source
    if ACCESS == 3:
        tile = x.load([h.to(tl.int32), first, column]).reshape(H * C, W)
    elif ACCESS == 2:
        tile = x.load([b.to(tl.int32), h.to(tl.int32), first, column]).reshape(H * C, W)
    else:
        unit: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth if ACCESS == 1 else 1
        row, channel = tl.arange(0, H * C), column + tl.arange(0, W)
        head, t = h + row // C, first + row % C
        at = (b * stride_b + head * stride_h + t.to(tl.int64) * stride_t) * unit
        at = at[:, None] + channel.to(tl.int64)[None, :] * stride_d
        inside = (t < stop)[:, None] & (channel < WIDTH)[None, :]
        tile = tl.load(x + at, mask=inside, other=0.0)
    return tile


@triton.jit
def made_places(
    line, first, tokens, stop, column, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Where such a tile lies in contiguous (lines, tokens, WIDTH), from `line` on, and what of it
    comes before token `stop`.
    """
    row, channel = tl.arange(0, H * C), column + tl.arange(0, W)
    t = first + row % C
    at = ((line + row // C) * tokens + t)[:, None] * WIDTH + channel[None, :]
    inside = (t < stop)[:, None] & (channel < WIDTH)[None, :]
    return at, inside


@triton.jit
def stacked(x, H: tl.constexpr, C: tl.constexpr):
    """x (C,), H times one behind the other."""
    return tl.reshape(tl.broadcast_to(x[None, :], (H, C)), (H * C,))


@triton.jit
def row_norms(X):
    """The norms (C,) of the rows of a tile in float32."""
    return tl.sqrt(tl.sum(X * X, 1))


@triton.jit
def counts(valid, valid_t, first, stop, C: tl.constexpr, VALID: tl.constexpr):
    """Which of C tokens are real, how many are up to and before each, and in all."""
    rows = tl.arange(0, C)
    real = real_rows(valid, valid_t, tl.cast(first, tl.int64) + rows, 0, stop, VALID)
    if VALID:
        one = tl.where(real, 1.0, 0.0)
        upto, total = tl.cumsum(one, 0), tl.sum(one, 0)
        before = upto - one
    else:
        left = tl.maximum(tl.minimum(stop - first, C), 0)
        upto, total = tl.minimum(rows + 1, left).to(tl.float32), tl.cast(left, tl.float32)
        before = tl.minimum(rows, left).to(tl.float32)
    return real, upto, before, total


@triton.jit
def read_powers(before, upto, bits, H: tl.constexpr, C: tl.constexpr):
    """The decay (H C, C) between the tokens of H heads that read (down) and those written before
    them (across): 0 where nothing is read.
    """
    down, across = tl.arange(0, H * C)[:, None] % C, tl.arange(0, C)[None, :]
    aged = bits * (stacked(before, H, C)[:, None] - upto[None, :])
    return tl.exp2(tl.where(down > across, aged, float("-inf")))


@triton.jit
def load_gates(rho, line, first, tokens, real, eta, C: tl.constexpr):
    """eta rho (C,) of tokens, 0 where they are not real."""
    at = rho + line * tokens + first + tl.arange(0, C)
    return eta * tl.load(at, mask=real, other=0.0)


@triton.jit
def place_of(
    table, segments, length, tokens, kv_heads, valid, valid_b, V: tl.constexpr, BV: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """A program's batch, kv head and first column; the first token of its segment and that behind
    it; the place of the segment's state among all, and that of its sequence's, which it may start
    or end; and where its valid tokens begin.
    """
    tiles: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    head = (program // tiles % kv_heads).to(tl.int64)
    segment = program // tiles // kv_heads
    sequence, batch, start, count, starts, ends = locate(
        table, segment, segments, length, tokens, PACKED
    )
    start = start.to(tl.int32)
    span = (start, start + count)
    states = (segment.to(tl.int64) * kv_heads + head, sequence * kv_heads + head, starts, ends)
    return batch, head, program % tiles * BV, span, states, valid + batch * valid_b


@triton.jit
def state_places(column, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr):
    """Where the numbers (BD, BV) of a state (D, DV) lie from `column` on, and which exist."""
    rows, columns = tl.arange(0, BD)[:, None], column + tl.arange(0, BV)[None, :]
    return rows * DV + columns, (rows < D) & (columns < DV)


@triton.jit(do_not_specialize=VARYING)
def sums_kernel(
    k, k_b, k_h, k_t, k_d, v, v_b, v_h, v_t, v_d, valid, valid_b, valid_t, rho, states, decays,
    table, tokens, length, segments, kv_heads, eta, bits,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    VALID: tl.constexpr, ACCESS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What a segment adds to the state behind it, and its log decay. Those of a sequence's last one
    are not asked for.
    """
    batch, head, column, span, states_of, valid = place_of(
        table, segments, length, tokens, kv_heads, valid, valid_b, DV, BV, PACKED
    )
    start, stop = span
    state, _own, _starts, ends = states_of
    if ends:
        return
    line = batch * kv_heads + head
    k_source = opened((k, k_b, k_h, k_t, k_d, kv_heads), batch, stop, 1, C, BD, D, ACCESS)
    v_source = opened((v, v_b, v_h, v_t, v_d, kv_heads), batch, stop, 1, C, BV, DV, ACCESS)
    S = tl.zeros((BD, BV), tl.float32)
    seen = tl.full((), 0.0, tl.float32)
    for first in range(start, stop, C):
        real, upto, _, total = counts(valid, valid_t, first, stop, C, VALID)
        K = load_rows(k_source, batch, head, first, stop, 0, 1, C, BD, D, ACCESS)
        X = load_rows(v_source, batch, head, first, stop, column, 1, C, BV, DV, ACCESS)
        weights = load_gates(rho, line, first, tokens, real, eta, C)
        weights *= tl.exp2(bits * (total - upto))
        weights /= floored(row_norms(K.to(tl.float32)))
        S *= tl.exp2(bits * total)
        H = (K * weights[:, None]).to(K.dtype)
        S = tl.dot(tl.trans(H), X, S, input_precision="ieee")
        seen += total
    places, inside = state_places(column, D, DV, BD, BV)
    tl.store(states + state * D * DV + places, S, mask=inside)
    if column == 0:
        tl.store(decays + state, bits * seen)


def operand(
    name: str, x: Tensor, tile: tuple[int, int, int], how: int
) -> dict[str, Any]:  # fmt: skip
    """The kernel arguments of a tensor (batch, heads, tokens, channels) that is read in tiles of so
    many heads, tokens and channels; `how` is ACCESS of all that are.
    """
    unit = 16 // x.element_size()
    # The stride of an axis of size 1 is never used, but a descriptor wants a valid one.
    strides = [x.stride(axis) if x.shape[axis] > 1 else unit for axis in range(3)]
    strides.append(x.stride(3))
    given: Tensor | TensorDescriptor = x
    if how == 2:
        given = TensorDescriptor(x, list(x.shape), strides, [1, *tile])
        strides = [1] * 4
    elif how == 1:
        strides = [*(stride // unit for stride in strides[:3]), strides[3]]
    return {name: given, **{f"{name}_{a}": s for a, s in zip("bhtd", strides, strict=True)}}


class Cut:
    """How a call's tokens are cut: blocks of `rows` in segments of `length`, and what each kernel
    takes of sizes, decay and padding.
    """

    def __init__(
        self, tensors: tuple[Tensor, ...], rho: Tensor, valid: Tensor | None,
        offsets: Tensor | None, eta: float, lam: float, block: int,
    ) -> None:  # fmt: skip
        """`tensors` are q, k, v and whatever else is read in tiles."""
        q, k, v = tensors[:3]
        batch, self.heads, tokens, self.d = q.shape
        self.kv_heads, self.dv, self.device = k.shape[1], v.shape[3], q.device
        processors, hopper = device_of(q)
        self.cfg = cfg = memory_config(q.element_size(), hopper)
        self.narrowest = NARROWEST if q.element_size() == 2 else 16
        self.rows = cfg.block
        rows = max(cfg.block, cfg.most // self.stack)
        self.block(min(rows, tile_width(block)) if block else rows)
        widest = max(self.narrowest, cfg.items // self.width(self.d))
        self.columns = min(128, self.width(self.dv), widest)
        self.tiles = -(-self.dv // self.columns)
        lines = batch * self.kv_heads
        many = max(1, int(cfg.programs * processors) // (lines * self.tiles))
        length = max(-(-tokens // many), cfg.least_segment)
        self.segments = cut(batch, tokens, -(-length // cfg.keys) * cfg.keys, offsets)
        self.cuts = self.segments.total * self.kv_heads
        self.how = access(*tensors)
        table = self.segments.table
        if table is not None and self.how == 2:
            self.how = 3
            prepare()
        placed = (k, 0, 0) if valid is None else (valid, *valid.stride())
        self.arguments: dict[str, Any] = {
            **dict(zip(("valid", "valid_b", "valid_t"), placed, strict=True)),
            "rho": rho.contiguous(), "table": k if table is None else table, "tokens": tokens,
            "length": self.segments.length, "segments": self.segments.each,
            "kv_heads": self.kv_heads, "eta": eta, "bits": -bits_lost(lam),
            "D": self.d, "DV": self.dv, "BD": self.width(self.d), "VALID": valid is not None,
            "ACCESS": self.how, "PACKED": table is not None,
        }  # fmt: skip

    def width(self, channels: int) -> int:
        """Of a tile that holds so many channels."""
        return max(self.narrowest, tile_width(channels))

    def block(self, rows: int) -> None:
        """Go on in blocks of so many tokens."""
        self.rows = rows

    @property
    def stack(self) -> int:
        """How many query heads of a kv head are read at once: they must divide its own."""
        group = self.heads // self.kv_heads
        return min(group & -group, max(1, self.cfg.stack // self.rows))

    def operands(
        self, heads: int = 1, columns: int | None = None, **tensors: Tensor
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments of tensors that are read so many heads and channels at a time, all channels
        if None.
        """
        arguments: dict[str, Any] = {}
        for name, x in tensors.items():
            tile = heads, self.rows, columns or self.width(x.shape[3])
            arguments |= operand(name, x, tile, self.how)
        return arguments

    def launch(self, kernel: Any, columns: int, tiles: int, **arguments: Any) -> None:
        """A program for each segment and `columns` columns of a kv head's state."""
        launch(
            kernel, self.cuts * tiles, **self.arguments, **arguments, C=self.rows, BV=columns,
            num_warps=self.cfg.warps, num_stages=self.cfg.stages,
        )  # fmt: skip

    def states(self) -> tuple[Tensor, Tensor]:
        """Room for a state and a log decay for each segment."""
        shape = (self.cuts, self.d, self.dv)
        return torch.empty(shape, device=self.device), torch.empty(self.cuts, device=self.device)

    def enter(self, k: Tensor, v: Tensor, initial: Tensor | None) -> Tensor | None:
        """The state entering each segment; None for zeros."""
        if not self.segments.chained:
            return initial
        states, decays = self.states()
        self.launch(
            sums_kernel, self.columns, self.tiles, **self.operands(k=k),
            **self.operands(1, self.columns, v=v), states=states, decays=decays,
        )  # fmt: skip
        self.chain(states, decays, initial, False)
        return states

    def last(self, initial: Tensor | None) -> Tensor:
        """Room for the state of each sequence; one without tokens has its `initial` one, or 0."""
        shape = (self.segments.sequences, self.kv_heads, self.d, self.dv)
        if self.segments.table is None:
            return torch.empty(shape, device=self.device)
        return torch.zeros(shape, device=self.device) if initial is None else initial.clone()

    def chain(
        self, states: Tensor, decays: Tensor, initial: Tensor | None, backward: bool
    ) -> None:  # fmt: skip
        """Turn the segments' sums into the states between them, in place."""
        numbers = self.d * self.dv
        items = min(1024, next_power_of_2(numbers))
        bounds = self.segments.bounds
        launch(
            chain_kernel, self.segments.sequences * self.kv_heads * -(-numbers // items),
            states, decays, states if initial is None else initial, states,
            decays if bounds is None else bounds, self.segments.each, self.kv_heads,
            D=self.d, DV=self.dv, ITEMS=items, PACKED=bounds is not None, DECAY=CONSTANT,
            INITIAL=initial is not None, BACKWARD=backward, FINAL=False, num_warps=4,
        )  # fmt: skip
