"""What the backward kernels need of each row, worked out once: a row is read by many tiles."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.flash import triton_launch as flash_host
from attnspec.fast.engines.flash.configs import FlashConfig
from attnspec.fast.engines.flash.triton_backward import row_sums
from attnspec.fast.engines.flash.triton_tiles import load_numbers
from attnspec.fast.engines.softplus.triton_maps import first_terms, second_terms

# The terms of a row, each a plane (batch, heads, tokens) of its own. Plain weights need the first
# four: the factor of the scores, delta, and what weights and m are multiplied by, the latter times
# the factor of the scores as keys want it. Sharpened ones add that without the factor, gain and cut
# of the second stage, c with and without the factor, and one over the first normaliser.
SCALE = tl.constexpr(0)
DELTA = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
SCALED_FACTOR = tl.constexpr(3)
FACTOR = tl.constexpr(4)
GAIN = tl.constexpr(5)
CUT = tl.constexpr(6)
SCALED_TAKEN = tl.constexpr(7)
TAKEN = tl.constexpr(8)
FIRST = tl.constexpr(9)
PLAIN_TERMS, SHARP_TERMS = 4, 10
NUMBERS = ["numbers", "q_tokens", "terms_stride", "eps", "power", "warm", "dead"]


@triton.jit(do_not_specialize=NUMBERS)
def softplus_terms_kernel(
    rows, delta, counts, terms, numbers, q_tokens, terms_stride, eps, power, warm, dead,
    HEADS: tl.constexpr, PRECISE: tl.constexpr, SHARP: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The terms of rows but for c, which is left to come."""
    row = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = row < numbers
    step = numbers.to(tl.int64)
    head, token = row // q_tokens, row % q_tokens
    at = terms + head * terms_stride + token
    plane = step // q_tokens * terms_stride
    scale = tl.load(rows + row, mask=inside, other=0.0)
    total = tl.load(rows + step + row, mask=inside, other=0.0)
    first = first_terms(total, eps)
    weight, factor = first, first
    if SHARP:
        count = tl.load(counts + head // HEADS * q_tokens + token, mask=inside, other=0.0)
        peak = tl.load(rows + 2 * step + row, mask=inside, other=-float("inf"))
        weight = tl.load(rows + 3 * step + row, mask=inside, other=0.0)
        gain, cut, _ = second_terms(total, peak, count, eps, warm, dead, PRECISE)
        factor = weight * gain * power
        tl.store(at + FACTOR * plane, factor, mask=inside)
        tl.store(at + GAIN * plane, gain, mask=inside)
        tl.store(at + CUT * plane, cut, mask=inside)
        tl.store(at + FIRST * plane, first, mask=inside)
    tl.store(at + SCALE * plane, scale, mask=inside)
    tl.store(at + DELTA * plane, tl.load(delta + row, mask=inside, other=0.0), mask=inside)
    tl.store(at + WEIGHT * plane, weight, mask=inside)
    tl.store(at + SCALED_FACTOR * plane, factor * scale, mask=inside)


@triton.jit
def load_term(TERM: tl.constexpr, planes, first, stop, ROWS: tl.constexpr, DESCRIBED: tl.constexpr):
    """One term of rows [first, first + ROWS) of a sequence, 0 from `stop` on. `planes` are (terms,
    number of sequences, the sequence, stride of sequences).
    """
    terms, sequences, sequence, stride = planes
    line = TERM * sequences + sequence
    return load_numbers((terms, line, 0, stride), first, stop, 0.0, ROWS, False, DESCRIBED)


def row_terms(
    dout: Tensor, out: Tensor, rows: Tensor, counts: Tensor, stages: dict[str, Any]
) -> Tensor:
    """The terms of all rows (terms, batch, heads, q_tokens), as the kernels read them."""
    _, delta = row_sums(dout, out, rows[1], None)
    _, batch, heads, q_tokens = rows.shape
    kinds = SHARP_TERMS if stages["SHARP"] else PLAIN_TERMS
    terms = flash_host.empty_numbers((kinds, batch, heads, q_tokens), rows.device)
    numbers, size = batch * heads * q_tokens, 256
    arguments = {
        **{name: stages[name] for name in ("eps", "power", "warm", "dead", "PRECISE", "SHARP")},
        "rows": rows, "delta": delta, "counts": counts, "terms": terms, "numbers": numbers,
        "q_tokens": q_tokens, "terms_stride": terms.stride(-2), "HEADS": heads, "SIZE": size,
    }  # fmt: skip
    chosen = FlashConfig(0, 0, 4, 1)
    flash_host.launch(softplus_terms_kernel, -(-numbers // size), chosen, arguments)
    return terms
