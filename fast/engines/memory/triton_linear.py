"""Launches of the linear memory's kernels: coefficients, scores, then one walk; and the way back.

What the gradient needs of the states is kept in the dtype of the inputs, as it enters products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.memory.configs import MemoryConfig, config
from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars
from attnspec.fast.engines.memory.triton_gradients import keys_kernel, queries_kernel
from attnspec.fast.engines.memory.triton_scalars import scalars, scalars_backward
from attnspec.fast.engines.memory.triton_walk import scores_kernel, walk_back_kernel, walk_kernel
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, tile_width


def _in_rows(x: Tensor) -> Tensor:
    """`x`, or a copy of it, with rows that each begin at a multiple of 16 numbers.

    Rows read number by number take an address each, more than a program has registers for; and
    from such code ptxas 12.8 has made wrong descriptors of tiles of 64 rows.
    """
    if x.stride(3) == 1 and not x.data_ptr() % 16 and all(n % 16 == 0 for n in x.stride()[:3]):
        return x
    width = x.shape[3]
    copy = x.new_empty(*x.shape[:3], 16 * cdiv(width, 16))[..., :width]
    return copy.copy_(x)


@dataclass
class Linear:
    """One call: its pieces, inputs, coefficients and configuration."""

    pieces: Pieces
    k: Tensor
    v: Tensor
    q: Tensor
    of: Scalars
    loss_scale: float
    cfg: MemoryConfig

    @classmethod
    def of_inputs(
        cls, pieces: Pieces, k: Tensor, v: Tensor, q: Tensor, rates: Rates, loss_scale: float,
        before: bool,
    ) -> Linear:  # fmt: skip
        hopper = k.is_cuda and torch.cuda.get_device_properties(k.device).major >= 9
        of = scalars(rates, pieces, before)
        cfg = config(k.element_size(), hopper)
        return cls(pieces, _in_rows(k), _in_rows(v), _in_rows(q), of, loss_scale, cfg)

    @property
    def memories(self) -> int:
        """Rows of tokens; packed sequences, whose memories are their own, lie in one."""
        return self.k.shape[0] * self.k.shape[1]

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def d(self) -> int:
        return self.k.shape[3]

    @property
    def dv(self) -> int:
        return self.v.shape[3]

    @property
    def nothing(self) -> bool:
        return not (self.memories and self.pieces.count)

    @property
    def columns(self) -> int:
        """Value channels that a program of a walk owns."""
        return max(16, min(tile_width(self.dv), self.cfg.walk_items // tile_width(self.d)))

    def rows(self, *names: str) -> tuple[Any, ...]:
        """These inputs, each before its strides between batch entries, heads and tokens."""
        inputs = [getattr(self, name) for name in names]
        return tuple(part for x in inputs for part in (x, *x.stride()[:3]))

    def place(self) -> tuple[Any, ...]:
        return self.pieces.table(self.k), *self._sizes()

    def walks(self) -> tuple[Any, ...]:
        """As `place`, for kernels that go through sequences."""
        packed = self.pieces.packed
        cuts = (self.k, self.k) if packed is None else (packed.offsets, packed.bounds)
        return *cuts, *self._sizes()

    def _sizes(self) -> tuple[int, ...]:
        p = self.pieces
        return p.tokens, p.b, p.per, p.count, p.size, self.k.shape[1], self.group

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.k.device)

    def walk_options(self) -> dict[str, Any]:
        return {
            "D": self.d, "DV": self.dv, "BD": tile_width(self.d), "BV": self.columns,
            "C": self.pieces.size, "LONG": self.pieces.per > 1, "PACKED": self.packed,
            "num_warps": self.cfg.walk_warps, "num_stages": self.cfg.walk_stages,
        }  # fmt: skip

    @property
    def packed(self) -> bool:
        return self.pieces.packed is not None

    def walkers(self, states: Tensor) -> int:
        return states.shape[0] * cdiv(self.dv, self.columns)

    def scores(self) -> Tensor:
        """q k^T times the coefficients, (query heads, pieces, size, size)."""
        p, heads = self.pieces, self.memories * self.group
        out = self.empty(heads, p.count, p.size, p.size, dtype=self.k.dtype)
        launch(
            scores_kernel, heads * p.count,
            *self.rows("k", "q"), self.of.G, out, *self.place(),
            D=self.d, C=p.size, TD=min(self.cfg.tile, tile_width(self.d)), PACKED=self.packed,
            num_warps=self.cfg.tile_warps, num_stages=self.cfg.tile_stages,
        )  # fmt: skip
        return out


def forward(
    pieces: Pieces, W: Tensor, S: Tensor, k: Tensor, v: Tensor, q: Tensor, rates: Rates,
    loss_scale: float, before: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last W and S (memories, numbers), and states and errors for the gradient if `keep`."""
    call = Linear.of_inputs(pieces, k, v, q, rates, loss_scale, before)
    y = call.empty(*q.shape[:3], call.dv, dtype=q.dtype)
    states, errors = W.new_empty(0), W.new_empty(0)
    if call.nothing:
        return y, W.clone(), S.clone(), states, errors
    last_W, last_S, of = torch.empty_like(W), torch.empty_like(S), call.of
    if keep:
        states = call.empty(call.memories, pieces.count, 2, call.d, call.dv, dtype=k.dtype)
        errors = call.empty(call.memories, pieces.count, pieces.size, call.dv, dtype=k.dtype)
    scores = call.scores()
    launch(
        walk_kernel, call.walkers(W),
        *call.rows("k", "v", "q"), W, S, of.rows, of.end, of.end_n, of.end_G, scores, y, last_W,
        last_S, states, errors, *call.walks(), loss_scale, KEEP=keep, **call.walk_options(),
    )  # fmt: skip
    return y, last_W, last_S, states, errors


def backward(
    pieces: Pieces, dy: Tensor, dW: Tensor, dS: Tensor, states: Tensor, errors: Tensor, k: Tensor,
    v: Tensor, q: Tensor, rates: Rates, loss_scale: float, before: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dW, dS (memories, numbers), dk, dv, dq, and drates (3, memories, tokens)."""
    call = Linear.of_inputs(pieces, k, v, q, rates, loss_scale, before)
    dk, dv, dq = (call.empty(*x.shape, dtype=x.dtype) for x in (k, v, q))
    if call.nothing:
        return dW.clone(), dS.clone(), dk, dv, dq, rates.theta.new_zeros(3, *rates.theta.shape)
    p, of, dy = pieces, call.of, dy.contiguous()
    first_dW, first_dS = torch.empty_like(dW), torch.empty_like(dS)
    dstates = torch.empty_like(states)
    launch(
        walk_back_kernel, call.walkers(dW),
        *call.rows("k", "q"), dy, of.rows, of.end, of.end_n, of.end_G, call.scores(), dW,
        dS, first_dW, first_dS, dstates, dv, *call.walks(), loss_scale, **call.walk_options(),
    )  # fmt: skip
    tile = min(call.cfg.tile, tile_width(call.d))
    tiles, heads = cdiv(call.d, tile), call.memories * call.group
    options = {
        "D": call.d, "DV": call.dv, "C": p.size, "TD": tile,
        "TV": min(call.cfg.tile, tile_width(call.dv)), "PACKED": call.packed,
        "num_warps": call.cfg.tile_warps, "num_stages": call.cfg.tile_stages,
    }  # fmt: skip
    dpairs = call.empty(heads, p.count, p.size, p.size, dtype=k.dtype)
    dG = call.empty(heads, p.count, p.size, p.size)
    drows = call.empty(heads, p.count, tiles, p.size, 2)
    launch(
        queries_kernel, heads * p.count * tiles,
        *call.rows("k", "q"), dy, states, errors, of.rows, of.G, dq, dpairs, drows, dG,
        *call.place(), **options,
    )  # fmt: skip
    dend = call.empty(call.memories, p.count, tiles, 3)
    dend_n, dend_G = (call.empty(call.memories, p.count, tiles, p.size) for _ in range(2))
    launch(
        keys_kernel, call.memories * p.count * tiles,
        *call.rows("k", "q"), dv, states, dstates, errors, of.end_n, of.end_G, dpairs, dk,
        dend, dend_n, dend_G, *call.place(), **options,
    )  # fmt: skip
    by_memory = (call.memories, call.group)
    dbeta, df = drows.sum(2).unflatten(0, by_memory).sum(1).unbind(-1)
    d = Scalars(
        torch.stack([dbeta, torch.zeros_like(df), df], -1), dG.new_empty(0),
        dG.unflatten(0, by_memory).sum(1), dend.sum(2), dend_n.sum(2), dend_G.sum(2),
    )  # fmt: skip
    return first_dW, first_dS, dk, dv, dq, scalars_backward(rates, p, before, d)
