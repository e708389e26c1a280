"""Triton kernels of the memory engine's scans: coefficients of a piece, weights over chunks.

Both are recurrences over tokens or chunks that are independent from column to column, and both walk
back through them for the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars
from attnspec.fast.engines.prepared import launch
from attnspec.fast.engines.sizes import cdiv, next_power_of_2

PLACE = ("tokens", "b", "per", "count", "size")


@triton.jit
def piece_at(piece, cuts, tokens, b, per, size, PACKED: tl.constexpr):
    """Which piece of its chunk a piece is, its first token and its number of tokens; those of
    PACKED sequences are in the table `cuts`.
    """
    if PACKED:
        row = cuts + tl.cast(piece, tl.int64) * 5
        turn = tl.load(row + 2)
        start = tl.load(row)
        length = tl.load(row + 1)
    else:
        turn = piece % per
        start = piece // per * b + turn * size
        length = tl.minimum(tl.minimum(size, b - turn * size), tokens - start)
    return turn, start, length


@triton.jit
def locate(program, cuts, tokens, b, per, count, size, PACKED: tl.constexpr):
    """Head and piece of a program, and its `piece_at`."""
    head = (program // count).to(tl.int64)
    piece = program % count
    turn, start, length = piece_at(piece, cuts, tokens, b, per, size, PACKED)
    return head, piece, turn, start, length


@triton.jit(do_not_specialize=PLACE)
def scalars_kernel(
    theta, eta, alpha, stored, rows, n_rows, G_rows, end, end_n, end_G, cuts, tokens, b, per,
    count, size, BC: tl.constexpr, BEFORE: tl.constexpr, STORED: tl.constexpr,
    WITH_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """One piece: its coefficients as each row reads them (BEFORE its token or behind it)."""
    program = tl.program_id(0)
    head, _piece, _turn, start, length = locate(program, cuts, tokens, b, per, count, size, PACKED)
    at = head * tokens + start
    row = program.to(tl.int64) * size
    column = tl.arange(0, BC)
    inside = column < size
    beta = tl.full((), 1.0, tl.float32)
    m = tl.full((), 1.0, tl.float32)
    f = tl.full((), 0.0, tl.float32)
    n = tl.zeros((BC,), tl.float32)
    G = tl.zeros((BC,), tl.float32)
    for t in range(size):
        if BEFORE:
            store_row(rows, n_rows, G_rows, beta, m, f, n, G, row + t, size, column, inside, WITH_N)
        real = t < length
        if STORED:
            real = real & (tl.load(stored + at + t, mask=real, other=0) != 0)
        step = tl.load(theta + at + t, mask=real, other=0.0)
        carried = tl.load(eta + at + t, mask=real, other=1.0)
        kept = 1.0 - tl.load(alpha + at + t, mask=real, other=0.0)
        m = carried * m
        beta = kept * beta
        f = tl.where(real, kept * f + m, f)
        n = tl.where(real & (column == t), step, carried * n)
        G = tl.where(real, kept * G + n, G)
        if not BEFORE:
            store_row(rows, n_rows, G_rows, beta, m, f, n, G, row + t, size, column, inside, WITH_N)
    last = end + program.to(tl.int64) * 3
    tl.store(last, beta)
    tl.store(last + 1, m)
    tl.store(last + 2, f)
    tl.store(end_n + row + column, n, mask=inside)
    tl.store(end_G + row + column, G, mask=inside)


@triton.jit
def store_row(
    rows, n_rows, G_rows, beta, m, f, n, G, row, size, column, inside, WITH_N: tl.constexpr
):
    """The coefficients of one row."""
    tl.store(rows + row * 3, beta)
    tl.store(rows + row * 3 + 1, m)
    tl.store(rows + row * 3 + 2, f)
    tl.store(G_rows + row * size + column, G, mask=inside)
    if WITH_N:
        tl.store(n_rows + row * size + column, n, mask=inside)


@triton.jit(do_not_specialize=PLACE)
def scalars_backward_kernel(
    theta, eta, alpha, stored, rows, n_rows, G_rows, drows, dn_rows, dG_rows, dend, dend_n, dend_G,
    dtheta, deta, dalpha, cuts, tokens, b, per, count, size, BC: tl.constexpr,
    BEFORE: tl.constexpr, STORED: tl.constexpr, WITH_N: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Back through one piece; rows, n_rows, G_rows are the coefficients before each token."""
    program = tl.program_id(0)
    head, _piece, _turn, start, length = locate(program, cuts, tokens, b, per, count, size, PACKED)
    at = head * tokens + start
    row = program.to(tl.int64) * size
    column = tl.arange(0, BC)
    inside = column < size
    last = dend + program.to(tl.int64) * 3
    ubeta = tl.load(last)
    um = tl.load(last + 1)
    uf = tl.load(last + 2)
    un = tl.load(dend_n + row + column, mask=inside, other=0.0)
    uG = tl.load(dend_G + row + column, mask=inside, other=0.0)
    for step in range(length):
        t = length - 1 - step
        here = row + t
        mbeta = tl.load(drows + here * 3)
        mm = tl.load(drows + here * 3 + 1)
        mf = tl.load(drows + here * 3 + 2)
        seen = inside & (column <= t)
        mG = tl.load(dG_rows + here * size + column, mask=seen, other=0.0)
        mn = tl.zeros((BC,), tl.float32)
        if WITH_N:
            mn = tl.load(dn_rows + here * size + column, mask=seen, other=0.0)
        if not BEFORE:
            ubeta += mbeta
            um += mm
            uf += mf
            uG += mG
            un += mn
        real = t < length
        if STORED:
            real = tl.load(stored + at + t) != 0
        carried = tl.load(eta + at + t, mask=real, other=1.0)
        kept = 1.0 - tl.load(alpha + at + t, mask=real, other=0.0)
        beta = tl.load(rows + here * 3)
        m = tl.load(rows + here * 3 + 1)
        f = tl.load(rows + here * 3 + 2)
        n = tl.load(n_rows + here * size + column, mask=seen, other=0.0)
        G = tl.load(G_rows + here * size + column, mask=seen, other=0.0)
        through_m = um + uf
        through_n = un + uG
        into_theta = tl.sum(tl.where(column == t, through_n, 0.0), 0)
        into_eta = through_m * m + tl.sum(through_n * n, 0)
        lost = ubeta * beta + uf * f + tl.sum(uG * G, 0)
        tl.store(dtheta + at + t, tl.where(real, into_theta, 0.0))
        tl.store(deta + at + t, tl.where(real, into_eta, 0.0))
        tl.store(dalpha + at + t, tl.where(real, -lost, 0.0))
        ubeta = ubeta * kept
        um = tl.where(real, carried * through_m, um)
        un = tl.where(real, carried * through_n, un)
        uf = uf * kept
        uG = uG * kept
        if BEFORE:
            ubeta += mbeta
            um += mm
            uf += mf
            uG += mG
            un += mn


def _launch(kernel: Any, rates: Rates, pieces: Pieces, tensors: Any, **options: Any) -> None:
    stored = rates.theta if rates.stored is None else rates.stored
    launch(
        kernel, rates.theta.shape[0] * pieces.count,
        rates.theta, rates.eta, rates.alpha, stored, *tensors, pieces.table(rates.theta),
        pieces.tokens, pieces.b, pieces.per, pieces.count, pieces.size,
        BC=next_power_of_2(pieces.size), STORED=rates.stored is not None,
        PACKED=pieces.packed is not None, num_warps=1 if pieces.size <= 128 else 4, **options,
    )  # fmt: skip


def scalars(rates: Rates, pieces: Pieces, before: bool, with_n: bool = False) -> Scalars:
    """The coefficients of all pieces; rows are those `before` their token, or behind it."""
    of = Scalars.empty(rates.theta, pieces, with_n)
    if of.rows.numel():
        n = of.n if with_n else of.G
        tensors = (of.rows, n, of.G, of.end, of.end_n, of.end_G)
        _launch(scalars_kernel, rates, pieces, tensors, BEFORE=before, WITH_N=with_n)
    return of


def scalars_backward(rates: Rates, pieces: Pieces, before: bool, d: Scalars) -> Tensor:
    """The gradients (3, heads, tokens) of theta, eta, alpha from those of `scalars`."""
    out = rates.theta.new_empty(3, *rates.theta.shape)
    if out.numel():
        of = scalars(rates, pieces, before=True, with_n=True)
        with_n = d.n.numel() > 0
        dn = d.n if with_n else d.G
        given = [x.contiguous() for x in (d.rows, dn, d.G, d.end, d.end_n, d.end_G)]
        tensors = (of.rows, of.n, of.G, *given, *out)
        _launch(scalars_backward_kernel, rates, pieces, tensors, BEFORE=before, WITH_N=with_n)
    return out


@triton.jit(do_not_specialize=["chunks", "width"])
def path_kernel(
    weights, momentum, gradients, eta, alpha, path, last, chunks, width, BLOCK: tl.constexpr
):
    """S = eta S - g and W = (1 - alpha) W + S for a block of one head's numbers."""
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    W = tl.load(weights + head * width + at, mask=inside)
    S = tl.load(momentum + head * width + at, mask=inside)
    out = path + head * (chunks + 1) * width + at
    tl.store(out, W, mask=inside)
    for chunk in range(chunks):
        g = tl.load(gradients + (head * chunks + chunk) * width + at, mask=inside)
        S = tl.load(eta + head * chunks + chunk) * S - g
        W = (1.0 - tl.load(alpha + head * chunks + chunk)) * W + S
        out += width
        tl.store(out, W, mask=inside)
    tl.store(last + head * width + at, S, mask=inside)


@triton.jit(do_not_specialize=["chunks", "width"])
def path_backward_kernel(
    dpath, dlast, first, gradients, eta, alpha, path, dweights, dmomentum, dgradients, deta, dalpha,
    chunks, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through `path_kernel`; deta and dalpha (heads, blocks, chunks) are a block's share.

    The momentum before each chunk is formed again, and waits where its gradient will be written: as
    a difference of weights it would have their rounding.
    """
    blocks = tl.cdiv(width, BLOCK)
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    whole = head * (chunks + 1) * width + at
    S = tl.load(first + head * width + at, mask=inside, other=0.0)
    for chunk in range(chunks):
        there = (head * chunks + chunk) * width + at
        tl.store(dgradients + there, S, mask=inside)
        g = tl.load(gradients + there, mask=inside, other=0.0)
        S = tl.load(eta + head * chunks + chunk) * S - g
    tl.debug_barrier()
    dW = tl.zeros((BLOCK,), tl.float32)
    dS = tl.load(dlast + head * width + at, mask=inside, other=0.0)
    share = program.to(tl.int64) * chunks
    for step in range(chunks):
        chunk = chunks - 1 - step
        here = whole + tl.cast(chunk, tl.int64) * width
        dW += tl.load(dpath + here + width, mask=inside, other=0.0)
        dS += dW
        W = tl.load(path + here, mask=inside, other=0.0)
        there = (head * chunks + chunk) * width + at
        S = tl.load(dgradients + there, mask=inside, other=0.0)
        tl.store(deta + share + chunk, tl.sum(dS * S, 0))
        tl.store(dalpha + share + chunk, -tl.sum(dW * W, 0))
        tl.store(dgradients + there, -dS, mask=inside)
        dS = tl.load(eta + head * chunks + chunk) * dS
        dW = (1.0 - tl.load(alpha + head * chunks + chunk)) * dW
    dW += tl.load(dpath + whole, mask=inside, other=0.0)
    tl.store(dweights + head * width + at, dW, mask=inside)
    tl.store(dmomentum + head * width + at, dS, mask=inside)


BLOCK = 512


def path(W: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor) -> Any:
    """The weights (heads, chunks + 1, width) before and behind every chunk, and the last momentum.

    W, S (heads, width), gradients (heads, chunks, width), eta, alpha (heads, chunks).
    """
    heads, chunks, width = gradients.shape
    out, last = W.new_empty(heads, chunks + 1, width), torch.empty_like(S)
    if heads:
        launch(
            path_kernel, heads * cdiv(width, BLOCK),
            W, S, gradients, eta, alpha, out, last, chunks, width, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return out, last


def path_backward(
    dpath: Tensor, dS: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dW, dS, dgradients, deta, dalpha of `path`."""
    heads, many, width = out.shape
    blocks = cdiv(width, BLOCK)
    dW, dS0 = torch.empty_like(S), torch.empty_like(S)
    dgradients = torch.empty_like(gradients)
    deta, dalpha = (out.new_empty(heads, blocks, many - 1) for _ in range(2))
    if heads:
        launch(
            path_backward_kernel, heads * blocks,
            dpath, dS, S, gradients, eta, alpha, out, dW, dS0, dgradients, deta, dalpha, many - 1,
            width, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dW, dS0, dgradients, deta.sum(1), dalpha.sum(1)
