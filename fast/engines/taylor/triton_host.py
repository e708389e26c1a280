"""The Taylor engine on Triton: how a call is cut in segments, and its launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.scan.segments import Segments, cut
from attnspec.fast.engines.scan.triton_states import chain_kernel
from attnspec.fast.engines.sizes import next_power_of_2, tile_width
from attnspec.fast.engines.taylor.configs import TaylorConfig, config
from attnspec.fast.engines.taylor.layout import packed_count, unpacked_count
from attnspec.fast.engines.taylor.triton_backward import dkv_kernel, dq_kernel
from attnspec.fast.engines.taylor.triton_forward import outputs_kernel, sums_kernel
from attnspec.fast.engines.taylor.triton_step import step_kernel

LEAST_SEGMENT = 256
"""Shorter segments by default would write more states than they save pairs."""


@dataclass
class Call:
    """One call: its tensors, sizes, configuration and the segments of its keys."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor | None
    causal: bool
    scale: float
    cfg: TaylorConfig
    length: int
    segments: Segments
    local: bool

    @classmethod
    def plan(
        cls, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Tensor | None,
        offsets: Tensor | None, causal: bool, scale: float, chunk: int,
    ) -> Call:  # fmt: skip
        cfg, keys = config(q.dtype), k.shape[2]
        many = packed_count(q.shape[3])
        length = -(-chunk // 64) * 64 if chunk else cfg.segment
        if length is None:
            length = max(LEAST_SEGMENT, next_power_of_2(2 * many))
        if offsets is None:
            length = min(length, max(keys, 1))
        local = causal or (state is None and keys <= 2 * many and q.shape[2] > 0)
        seen = None if key_mask is None else key_mask.view(torch.uint8)
        segments = cut(q.shape[0], keys, length, offsets)
        return cls(q, k, v, seen, causal, scale, cfg, length, segments, local)

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def features(self) -> int:
        return packed_count(self.q.shape[3])

    @property
    def items(self) -> int:
        """Numbers of one state: S, then zk."""
        return self.features * (self.v.shape[3] + 1)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.q.device)

    def arithmetic(self) -> dict[str, Any]:
        """The dtype of products. float16 needs the range of float32, and its features are no TF32
        numbers: it is as slow as float32.
        """
        import triton.language as tl

        bf16 = self.q.dtype == torch.bfloat16
        return {
            "MATH": tl.bfloat16 if bf16 else tl.float32,
            "PREC": "ieee",
        }

    def sizes(self, *tensors: Tensor) -> dict[str, Any]:
        """The compile-time sizes that all kernels take."""
        d, dv = self.q.shape[3], self.v.shape[3]
        aligned = all(stride % 16 == 0 for x in tensors for stride in x.stride()[:3])
        return {"D": d, "DV": dv, "F": self.features, "BD": tile_width(d), "ALIGNED": aligned}

    def mask(self) -> tuple[Any, ...]:
        """The key mask and its strides; k stands in for none."""
        if self.key_mask is None:
            return self.k, 0, 0
        return self.key_mask, *self.key_mask.stride()

    def place(self) -> tuple[int, int, int, int]:
        """The integers that locate a segment."""
        return self.segments.each, self.segments.length, self.k.shape[2], self.q.shape[2]

    def launched(self, tile: int, tokens: int) -> tuple[int, int]:
        """Segments of the grid, and tiles of `tile` rows in each."""
        if self.causal:
            return self.segments.total, -(-self.segments.length // tile)
        return self.q.shape[0], -(-tokens // tile)

    def table(self) -> Tensor:
        return self.q if self.segments.table is None else self.segments.table

    def sums(self, do: Tensor | None = None, rows: tuple[Tensor, ...] = ()) -> Tensor:
        """Every segment's sums of k and v; or of q and `do` under the weights `rows`."""
        cfg, back = self.cfg, do is not None
        x, y = (self.k, self.v) if do is None else (self.q, do)
        shift = self.k.shape[2] - self.q.shape[2] if back and self.causal else 0
        segments, tokens = self.segments, self.k.shape[2]
        if back and not self.causal:
            tokens = self.q.shape[2]
            segments = cut(self.q.shape[0], tokens, min(self.length, max(tokens, 1)), None)
        states = self.empty(segments.total * self.kv_heads, self.items)
        dv = self.v.shape[3]
        tile = min(cfg.sum_columns, tile_width(dv))
        tiles = -(-dv // tile) * -(-self.features // cfg.sum_features)
        programs = segments.total * self.kv_heads * tiles
        launch(
            sums_kernel, programs,
            x, *x.stride(), y, *y.stride(), *(rows if back else (x, x)),
            *((x, 0, 0) if back else self.mask()), states, self.table(), self.scale,
            segments.each, segments.length, tokens, shift, x.shape[2], self.kv_heads,
            BV=tile, BF=cfg.sum_features, C=cfg.sum_rows,
            GROUP=self.heads // self.kv_heads if back else 1, WEIGHTED=back,
            MASKED=self.key_mask is not None and not back,
            PACKED=segments.table is not None, **self.sizes(x, y), **self.arithmetic(),
            num_warps=cfg.sum_warps, num_stages=cfg.sum_stages,
        )  # fmt: skip
        return states

    def chain(self, states: Tensor, initial: Tensor | None, backward: bool) -> Tensor:
        """Turn the sums of segments into the states between them, in place; all of them added."""
        segments = self.segments
        per_head = segments.sequences * self.kv_heads
        each = states.shape[0] // max(1, per_head) if segments.table is None else segments.each
        total = self.empty(segments.sequences, self.kv_heads, self.items)
        items = min(1024, next_power_of_2(self.items))
        decays = torch.zeros(max(1, states.shape[0]), device=states.device)
        programs = per_head * -(-self.items // items)
        launch(
            chain_kernel, programs,
            states, decays, states if initial is None else initial, total,
            decays if segments.bounds is None else segments.bounds, each, self.kv_heads,
            D=1, DV=self.items, ITEMS=items, PACKED=segments.table is not None, DECAY=0,
            INITIAL=initial is not None, BACKWARD=backward, FINAL=True, num_warps=4,
        )  # fmt: skip
        return total

    def enter(self, state: Tensor | None, want: bool) -> tuple[Tensor | None, Tensor | None]:
        """The state each segment (each sequence, if not causal) reads, and the last one."""
        chained = self.segments.chained if self.causal else not self.local
        if not chained and not want:
            return state, None
        states = self.sums()
        total = self.chain(states, state, backward=False)
        if not self.causal:
            return (None if self.local else total), total
        return (states if chained else state), total

    def leave(
        self, do: Tensor, rows: tuple[Tensor, ...], dtotal: Tensor | None, stated: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of the state behind each segment, and of the state before the first."""
        chained = self.segments.chained if self.causal else not self.local
        if not chained and not stated:
            return dtotal, None
        states = self.sums(do, rows)
        total = self.chain(states, dtotal, backward=True)
        if not self.causal:
            return total, total
        return (states if chained else dtotal), total


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: Tensor | None,
    offsets: Tensor | None, causal: bool, scale: float, eps: float, use_norm: bool, want: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """out, z (batch, heads, q_tokens) and the last states (sequences, kv_heads, items)."""
    call = Call.plan(q, k, v, key_mask, state, offsets, causal, scale, chunk)
    cfg, dv = call.cfg, v.shape[3]
    entering, total = call.enter(state, want)
    out = torch.empty(*q.shape[:3], dv, dtype=q.dtype, device=q.device)
    z = call.empty(*q.shape[:3])
    tile = min(cfg.columns, tile_width(dv))
    segments, tiles = call.launched(cfg.rows, q.shape[2])
    programs = segments * call.heads * tiles * -(-dv // tile)
    if q.shape[2] and programs:
        launch(
            outputs_kernel, programs,
            q, *q.stride(), k, *k.stride(), v, *v.stride(), *call.mask(),
            z if entering is None else entering, out, z, call.table(), scale, eps, *call.place(),
            tiles, call.heads, call.heads // call.kv_heads,
            BV=tile, BF=cfg.features, BM=cfg.rows, BN=cfg.keys, CAUSAL=causal, LOCAL=call.local,
            REMOTE=entering is not None, NORM=use_norm, MASKED=key_mask is not None,
            PACKED=offsets is not None, SPLIT=q.dtype == torch.bfloat16,
            **call.sizes(q, k, v), **call.arithmetic(), num_warps=cfg.warps, num_stages=cfg.stages,
        )  # fmt: skip
    return out, z, q.new_empty(0, dtype=torch.float32) if not want or total is None else total


def backward(
    do: Tensor, dtotal: Tensor | None, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
    state: Tensor | None, offsets: Tensor | None, out: Tensor, z: Tensor, causal: bool,
    scale: float, eps: float, use_norm: bool, chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and the gradient of the first state (empty if there is none)."""
    call = Call.plan(q, k, v, key_mask, state, offsets, causal, scale, chunk)
    cfg, dv = call.cfg, v.shape[3]
    inverse, delta = torch.ones_like(z), torch.zeros_like(z)
    if use_norm:
        inverse = torch.where(z == 0, 0.0, 1 / (z + eps))
        delta = torch.linalg.vecdot(do.float(), out.float())
    dtotal = None if dtotal is None else dtotal.contiguous()
    entering, _ = call.enter(state, False)
    leaving, dstate = call.leave(do, (inverse, -delta * inverse), dtotal, state is not None)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    dvalues = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tensors = (q, *q.stride(), k, *k.stride(), v, *v.stride(), do, *do.stride(), *call.mask())
    options: dict[str, Any] = {
        **call.sizes(q, k, v, do), **call.arithmetic(), "BV": tile_width(dv), "BF": cfg.features,
        "BM": cfg.back_rows, "BN": cfg.back_keys, "CAUSAL": causal,
        "MASKED": key_mask is not None, "PACKED": offsets is not None,
        "SPLIT": q.dtype == torch.bfloat16, "num_warps": cfg.back_warps,
        "num_stages": cfg.back_stages,
    }  # fmt: skip
    segments, tiles = call.launched(cfg.back_rows, q.shape[2])
    if q.shape[2] and segments * call.heads * tiles:
        launch(
            dq_kernel, segments * call.heads * tiles,
            *tensors, inverse, delta, z if entering is None else entering, dq, call.table(), scale,
            *call.place(), tiles, call.heads, call.heads // call.kv_heads,
            LOCAL=call.local, REMOTE=entering is not None, **options,
        )  # fmt: skip
    segments, tiles = call.launched(cfg.back_keys, k.shape[2])
    if k.shape[2] and segments * call.kv_heads * tiles:
        launch(
            dkv_kernel, segments * call.kv_heads * tiles,
            *tensors, inverse, delta, z if leaving is None else leaving, dk, dvalues, call.table(),
            scale, *call.place(), tiles, call.kv_heads, GROUP=call.heads // call.kv_heads,
            LOCAL=call.local and q.shape[2] > 0, REMOTE=leaving is not None, **options,
        )  # fmt: skip
    return dq, dk, dvalues, q.new_empty(0, dtype=torch.float32) if dstate is None else dstate


def step(
    S: Tensor, zk: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """o (batch, heads, 1, dv) of one token, and the state with it, unpacked and float32."""
    batch, kv_heads, _, d = k.shape
    group, dv, many = q.shape[1] // kv_heads, v.shape[3], unpacked_count(d)
    out = torch.empty(batch, q.shape[1], 1, dv, dtype=q.dtype, device=q.device)
    new_S = torch.empty(batch, kv_heads, many, dv, dtype=torch.float32, device=q.device)
    new_zk = torch.empty(batch, kv_heads, many, dtype=torch.float32, device=q.device)
    members = next_power_of_2(group)
    tile = min(64, tile_width(dv))
    programs = batch * kv_heads * -(-dv // tile)
    if programs:
        launch(
            step_kernel, programs,
            S, *S.stride(), zk, *zk.stride(), *_token(q), *_token(k), *_token(v), new_S, new_zk,
            out, scale, eps, kv_heads,
            D=d, DV=dv, F=many, BV=tile, BF=max(2, 32 // members), GROUP=group, BG=members,
            num_warps=4,
        )  # fmt: skip
    return out, new_S, new_zk


def _token(x: Tensor) -> tuple[Any, ...]:
    """A (batch, heads, 1, width) tensor and its strides without the token's."""
    return x, x.stride(0), x.stride(1), x.stride(3)
