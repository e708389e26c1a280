"""Rows of two arrays as one, in Triton: states with their norms, and what tokens read.

Where the rows of the results stand is told by numbers, so that nothing is moved afterwards.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import Prepared
from attnspec.fast.engines.sizes import cdiv, next_power_of_2
from attnspec.fast.engines.strides import layout_of

TOKENS = 16
"""Tokens whose values of a head a program copies."""

VARYING = ["a_b", "a_t", "b_b", "b_t", "tokens", "split"]


@triton.jit(do_not_specialize=VARYING)
def join_normed_kernel(
    a, a_b, a_t, a_d, b, b_b, b_t, b_d, gain, place, row_place, X, h, rows, tokens, split,
    eps: tl.float32, D: tl.constexpr, WIDTH: tl.constexpr, A_UNIT: tl.constexpr,
    B_UNIT: tl.constexpr,
):  # fmt: skip
    """A program takes one row: as it is, and its norm to its place and, behind `split`, to that
    among rows.
    """
    program = tl.program_id(0)
    batch = (program // tokens).to(tl.int64)
    token = (program % tokens).to(tl.int64)
    channel = tl.arange(0, WIDTH).to(tl.int64)
    inside = channel < D
    if A_UNIT > 1:
        a_d = 1
    if B_UNIT > 1:
        b_d = 1
    if token < split:
        x = tl.load(
            a + (batch * a_b + token * a_t) * A_UNIT + channel * a_d, mask=inside, other=0.0
        )
    else:
        x = tl.load(
            b + (batch * b_b + (token - split) * b_t) * B_UNIT + channel * b_d, mask=inside,
            other=0.0,
        )  # fmt: skip
    tl.store(X + (batch * tokens + token) * D + channel, x, mask=inside)
    wide = x.to(tl.float32)
    normed = wide * (1.0 / tl.sqrt(tl.sum(wide * wide, 0) / D + eps))
    normed *= tl.load(gain + channel, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(h.dtype.element_ty)
    at = tl.load(place + token).to(tl.int64)
    tl.store(h + (batch * tokens + at) * D + channel, normed, mask=inside)
    if token >= split:
        at = tl.load(row_place + token - split).to(tl.int64)
        tl.store(rows + (batch * (tokens - split) + at) * D + channel, normed, mask=inside)


@triton.jit(do_not_specialize=["v_b", "v_h", "v_t", "out_b", "out_h", "out_t", "tokens", "split"])
def join_read_kernel(
    v, v_b, v_h, v_t, v_d, out, out_b, out_h, out_t, out_d, place, row_place, read, tokens, split,
    HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    V_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program takes tokens in one head: values before `split`, outputs of attention behind."""
    program = tl.program_id(0)
    head = (program % HEADS).to(tl.int64)
    tiles = (tokens + TOKENS - 1) // TOKENS
    batch = (program // HEADS // tiles).to(tl.int64)
    token = (program // HEADS) % tiles * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDTH).to(tl.int64)[None, :]
    real = token < tokens
    inside = real[:, None] & (channel < D)
    if V_UNIT > 1:
        v_d = 1
    if OUT_UNIT > 1:
        out_d = 1
    first = token < split
    at = tl.load(place + token, mask=first & real, other=0).to(tl.int64)
    v += (batch * v_b + head // GROUP * v_h) * V_UNIT + (at * v_t * V_UNIT)[:, None]
    own = tl.load(v + channel * v_d, mask=inside & first[:, None], other=0.0)
    at = tl.load(row_place + token - split, mask=real & (token >= split), other=0).to(tl.int64)
    out += (batch * out_b + head * out_h) * OUT_UNIT + (at * out_t * OUT_UNIT)[:, None]
    seen = tl.load(out + channel * out_d, mask=inside & (token >= split)[:, None], other=0.0)
    line = (batch * tokens + token) * HEADS + head
    tl.store(read + (line * D)[:, None] + channel, tl.where(first[:, None], own, seen), mask=inside)


Kind = tuple[torch.Size, int, tuple[int, ...]]


def _kind(x: Tensor) -> Kind:
    """Shape, unit and strides, on which a launch depends."""
    return x.shape, *layout_of(x)


@functools.lru_cache(maxsize=64)
def _normed(
    a: Kind, b: Kind, eps: float, dtype: torch.dtype, numbers: torch.dtype, device: torch.device
) -> Prepared:
    batch, split, D = a[0]
    tokens = split + b[0][1]
    x, number = torch.empty(0, dtype=dtype), torch.empty(0, dtype=numbers)
    width = next_power_of_2(D)
    arguments: dict[str, Any] = {
        **dict.fromkeys(("a", "b", "gain", "X", "h", "rows"), x),
        "place": number, "row_place": number, "tokens": tokens, "split": split, "eps": eps,
        **{f"a_{axis}": s for axis, s in zip("btd", a[2], strict=True)},
        **{f"b_{axis}": s for axis, s in zip("btd", b[2], strict=True)},
        "D": D, "WIDTH": width, "A_UNIT": a[1], "B_UNIT": b[1],
    }  # fmt: skip
    warps = min(8, max(1, width // 512))
    return Prepared(join_normed_kernel, batch * tokens, arguments, device, num_warps=warps)


def join_normed(
    a: Tensor, b: Tensor, gain: Tensor, eps: float, place: Tensor, row_place: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `joined.join_normed`."""
    batch, split, D = a.shape
    tokens = split + b.shape[1]
    X, h = a.new_empty(batch, tokens, D), a.new_empty(batch, tokens, D)
    rows = a.new_empty(batch, tokens - split, D)
    launch = _normed(_kind(a), _kind(b), float(eps), a.dtype, place.dtype, a.device)
    launch(
        a=a, b=b, gain=gain.contiguous(), place=place, row_place=row_place, X=X, h=h, rows=rows
    )  # fmt: skip
    return X, h, rows


@functools.lru_cache(maxsize=64)
def _read(
    v: Kind, out: Kind, dtype: torch.dtype, numbers: torch.dtype, device: torch.device
) -> Prepared:
    batch, heads, behind, d = out[0]
    tokens = v[0][2]
    x, number = torch.empty(0, dtype=dtype), torch.empty(0, dtype=numbers)
    arguments: dict[str, Any] = {
        **dict.fromkeys(("v", "out", "read"), x),
        "place": number, "row_place": number, "tokens": tokens, "split": tokens - behind,
        **{f"v_{axis}": s for axis, s in zip("bhtd", v[2], strict=True)},
        **{f"out_{axis}": s for axis, s in zip("bhtd", out[2], strict=True)},
        "HEADS": heads, "GROUP": heads // v[0][1], "D": d, "WIDTH": next_power_of_2(d),
        "V_UNIT": v[1], "OUT_UNIT": out[1], "TOKENS": TOKENS,
    }  # fmt: skip
    programs = batch * heads * cdiv(tokens, TOKENS)
    return Prepared(join_read_kernel, programs, arguments, device, num_warps=4)


def join_read(v: Tensor, out: Tensor, place: Tensor, row_place: Tensor) -> Tensor:
    """As `joined.join_read`."""
    batch, heads, _, d = out.shape
    read = v.new_empty(batch, v.shape[2], heads * d)
    launch = _read(_kind(v), _kind(out), v.dtype, place.dtype, v.device)
    launch(v=v, out=out, place=place, row_place=row_place, read=read)
    return read
