"""The rotation of queries and keys in Triton: one launch, every number read once and written once.

A program turns a tile of tokens in a few heads. Angles are formed, reduced and turned into cosines
and sines in float64, once for all heads of the program: some 30 operations for each pair of a
token, which even at a 64th of the speed of float32 take less time than the memory. There are no
tables, and positions 0, 1, ... and the usual frequencies need not be stored either.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.rows.configs import config
from attnspec.fast.engines.rows.turning import Turn
from attnspec.fast.engines.sizes import cdiv, next_power_of_2
from attnspec.fast.engines.strides import layout_of

PROGRAMS = 2048
"""Programs that an operand should have; heads beyond are taken by the same program."""

INTEGERS = [
    "q_b", "q_h", "q_t", "q_d", "k_b", "k_h", "k_t", "k_d", "pq_b", "pq_t", "pk_b", "pk_t",
    "q_heads", "q_tokens", "q_chunk", "q_programs", "k_heads", "k_tokens", "k_chunk", "first",
]  # fmt: skip


@triton.jit
def cosine_and_sine(angle):
    """Both in float64, to its rounding error, for angles up to some 2^31."""
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in two parts; the products are fused with the subtractions.
    rest = tl.fma(quarters, tl.full(angle.shape, -1.5707963267948966, tl.float64), angle)
    rest = tl.fma(quarters, tl.full(angle.shape, -6.123233995736766e-17, tl.float64), rest)
    square = rest * rest
    sine = -7.647163731819816e-13 * square + 1.605904383682161e-10
    sine = sine * square - 2.505210838544172e-08
    sine = sine * square + 2.7557319223985893e-06
    sine = sine * square - 0.0001984126984126984
    sine = sine * square + 0.008333333333333333
    sine = sine * square - 0.16666666666666666
    sine = sine * square * rest + rest
    cosine = 4.779477332387385e-14 * square - 1.1470745597729725e-11
    cosine = cosine * square + 2.08767569878681e-09
    cosine = cosine * square - 2.755731922398589e-07
    cosine = cosine * square + 2.48015873015873e-05
    cosine = cosine * square - 0.001388888888888889
    cosine = cosine * square + 0.041666666666666664
    cosine = cosine * square - 0.5
    cosine = cosine * square + 1.0
    quarter = quarters.to(tl.int64)
    odd = (quarter & 1) != 0
    x, y = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -x, x), tl.where((quarter & 2) != 0, -y, y)


@triton.jit
def coefficients(
    places, p_b, p_t, f, batch, token, tokens, first, log_base, decay, centre, log_c, floor, WIDE,
    HALF: tl.constexpr, BH: tl.constexpr, INVERSE: tl.constexpr, PLACED: tl.constexpr,
    GIVEN: tl.constexpr, GROWN: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Cosines and sines (tokens, pairs) times the amplitudes of pairs and the scales of rows."""
    pair = tl.arange(0, BH)
    if PLACED:
        place = tl.load(places + batch * p_b + token * p_t, mask=token < tokens, other=0)
        place = place.to(tl.float64)
    else:
        place = (token + first).to(tl.float64)
    if GIVEN:
        frequency = tl.load(f + pair, mask=pair < HALF, other=0).to(tl.float64)
    else:
        frequency = tl.exp(pair.to(tl.float64) * (log_base / -HALF))
    cos, sin = cosine_and_sine(place[:, None] * frequency[None, :])
    if GROWN:
        zeta = (2 * pair.to(tl.float64) + 0.8 * HALF) / (2.8 * HALF)
        amplitude = tl.exp((place - centre)[:, None] * (tl.log(zeta) * decay)[None, :])
        cos, sin = cos * amplitude, sin * amplitude
    if SCALED:
        rows = tl.maximum(tl.log(tl.maximum(place, 0.0) + 1.0) / log_c, floor)[:, None]
        cos, sin = cos * rows, sin * rows
    if INVERSE:
        sin = -sin
    return cos.to(WIDE), sin.to(WIDE)


@triton.jit
def turn_heads(
    program, x, x_b, x_h, x_t, x_d, y, places, p_b, p_t, f, heads, tokens, chunk, first, log_base,
    decay, centre, log_c, floor, HALF: tl.constexpr, REST: tl.constexpr, NEIGHBOURS: tl.constexpr,
    INVERSE: tl.constexpr, PLACED: tl.constexpr, GIVEN: tl.constexpr, GROWN: tl.constexpr,
    SCALED: tl.constexpr, UNIT: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one operand in `chunk` heads."""
    D: tl.constexpr = 2 * HALF + REST
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    tiles = (tokens + R - 1) // R
    chunks = (heads + chunk - 1) // chunk
    head = (program // tiles) % chunks * chunk
    batch = (program // tiles // chunks).to(tl.int64)
    token = (program % tiles).to(tl.int64) * R + tl.arange(0, R)
    cos, sin = coefficients(
        places, p_b, p_t, f, batch, token, tokens, first, log_base, decay, centre, log_c, floor,
        WIDE, HALF, BH, INVERSE, PLACED, GIVEN, GROWN, SCALED,
    )  # fmt: skip
    real = (token < tokens)[:, None]
    # Strides of aligned rows are counted in 16 bytes, so that the compiler knows them to be that.
    x += batch * x_b * UNIT + (token * x_t * UNIT)[:, None]
    y += batch * heads * tokens * D + (token * D)[:, None]
    if UNIT > 1:
        x_d = 1
    for each in range(head, tl.minimum(head + chunk, heads)):
        source = x + tl.cast(each, tl.int64) * x_h * UNIT
        target = y + tl.cast(each, tl.int64) * tokens * D
        if NEIGHBOURS:
            channel = tl.arange(0, 2 * BH)[None, :]
            inside = real & (channel < 2 * HALF)
            both = tl.load(source + channel * x_d, mask=inside, other=0.0).to(WIDE)
            a, b = tl.split(both.reshape(R, BH, 2))
            both = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(R, 2 * BH)
            tl.store(target + channel, both.to(y.dtype.element_ty), mask=inside)
        else:
            channel = tl.arange(0, BH)[None, :]
            inside = real & (channel < HALF)
            a = tl.load(source + channel * x_d, mask=inside, other=0.0).to(WIDE)
            b = tl.load(source + (channel + HALF) * x_d, mask=inside, other=0.0).to(WIDE)
            first_half, second_half = a * cos - b * sin, b * cos + a * sin
            tl.store(target + channel, first_half.to(y.dtype.element_ty), mask=inside)
            tl.store(target + channel + HALF, second_half.to(y.dtype.element_ty), mask=inside)
        if REST > 0:
            channel = 2 * HALF + tl.arange(0, BR)[None, :]
            inside = real & (channel < D)
            a = tl.load(source + channel * x_d, mask=inside, other=0.0)
            tl.store(target + channel, a.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=INTEGERS)
def turn_kernel(
    q, q_b, q_h, q_t, q_d, q_out, pq, pq_b, pq_t, k, k_b, k_h, k_t, k_d, k_out, pk, pk_b, pk_t, f,
    q_heads, q_tokens, q_chunk, q_programs, k_heads, k_tokens, k_chunk, first,
    log_base: tl.float64, decay: tl.float64, centre: tl.float64, log_c: tl.float64,
    floor: tl.float64, HALF: tl.constexpr, REST: tl.constexpr, NEIGHBOURS: tl.constexpr,
    INVERSE: tl.constexpr, Q_PLACED: tl.constexpr, K_PLACED: tl.constexpr, GIVEN: tl.constexpr,
    GROWN: tl.constexpr, SCALED: tl.constexpr, Q_UNIT: tl.constexpr, K_UNIT: tl.constexpr,
    PAIR: tl.constexpr, R: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """The programs of q come first, then those of k, whose amplitudes are the inverse."""
    program = tl.program_id(0)
    if program < q_programs:
        turn_heads(
            program, q, q_b, q_h, q_t, q_d, q_out, pq, pq_b, pq_t, f, q_heads, q_tokens, q_chunk,
            first, log_base, decay, centre, log_c, floor, HALF, REST, NEIGHBOURS, INVERSE, Q_PLACED,
            GIVEN, GROWN, SCALED, Q_UNIT, R, BH, BR,
        )  # fmt: skip
    elif PAIR:
        turn_heads(
            program - q_programs, k, k_b, k_h, k_t, k_d, k_out, pk, pk_b, pk_t, f, k_heads,
            k_tokens, k_chunk, 0, log_base, -decay, centre, log_c, floor, HALF, REST, NEIGHBOURS,
            INVERSE, K_PLACED, GIVEN, GROWN, False, K_UNIT, R, BH, BR,
        )  # fmt: skip


def turn(
    q: Tensor, k: Tensor | None, pq: Tensor | None, pk: Tensor | None, f: Tensor | None, how: Turn
) -> tuple[Tensor, Tensor]:
    d = q.shape[3]
    width, chosen = next_power_of_2(how.half), config()
    rest = d - 2 * how.half
    tile = max(1, chosen.elements // (2 * width))
    q_out = q.new_empty(q.shape, dtype=how.dtype)
    k_out = q.new_empty(0, dtype=how.dtype) if k is None else k.new_empty(k.shape, dtype=how.dtype)
    q_chunk, q_programs = _share(q, tile)
    k_chunk, k_programs = (1, 0) if k is None else _share(k, tile)
    q_unit, q_strides = layout_of(q)
    k_unit, k_strides = (1, (0, 0, 0, 0)) if k is None else layout_of(k)
    launch(
        turn_kernel, q_programs + k_programs,
        q.detach(), *q_strides, q_out, *_places(pq), None if k is None else k.detach(), *k_strides,
        k_out, *_places(pk), None if f is None else f.detach().contiguous(), *q.shape[1:3],
        q_chunk, q_programs, *((1, 0) if k is None else k.shape[1:3]), k_chunk, how.first,
        how.log_base, how.decay, float(how.centre), how.log_c, how.floor, HALF=how.half, REST=rest,
        NEIGHBOURS=how.neighbours, INVERSE=how.inverse, Q_PLACED=pq is not None,
        K_PLACED=pk is not None, GIVEN=f is not None, GROWN=how.decay != 0.0,
        SCALED=how.log_c != 0.0, Q_UNIT=q_unit, K_UNIT=k_unit,
        PAIR=k is not None, R=tile, BH=width, BR=next_power_of_2(rest) if rest else 1,
        num_warps=chosen.warps,
    )  # fmt: skip
    return q_out, k_out


def _share(x: Tensor, tile: int) -> tuple[int, int]:
    """Heads of a program and the programs of an operand."""
    batch, heads, tokens, _ = x.shape
    tiles = batch * cdiv(tokens, tile)
    chunk = max(1, min(heads, heads * tiles // PROGRAMS))
    return chunk, tiles * cdiv(heads, chunk)


def _places(p: Tensor | None) -> tuple[Any, ...]:
    """Positions and their strides, that of the batch 0 if all its entries share them."""
    return (None, 0, 0) if p is None else (p, p.stride(0) if p.dim() == 2 else 0, p.stride(-1))
