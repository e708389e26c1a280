"""Scalars and weight paths of the memory engine on the CPU; its products are torch's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from attnspec.fast.backend import count_launch
from attnspec.fast.engines.memory.plan import Pieces, Rates, Scalars


@njit(cache=True, nogil=True, parallel=True)
def _scalars(
    theta: Any, eta: Any, alpha: Any, stored: Any, rows: Any, n_rows: Any, G_rows: Any, end: Any,
    end_n: Any, end_G: Any, starts: Any, lengths: Any, size: int, before: bool,
) -> None:  # fmt: skip
    count = len(starts)
    for program in prange(theta.shape[0] * count):
        head, piece = program // count, program % count
        start, length = starts[piece], lengths[piece]
        one = theta.dtype.type(1)
        beta, m, f = one, one, one - one
        n = np.zeros(size, theta.dtype)
        G = np.zeros(size, theta.dtype)
        for t in range(size):
            if before:
                rows[head, piece, t, 0] = beta
                rows[head, piece, t, 1] = m
                rows[head, piece, t, 2] = f
                G_rows[head, piece, t] = G
                if n_rows.size:
                    n_rows[head, piece, t] = n
            at = start + t
            if t < length and (stored.size == 0 or stored[head, at] != 0):
                kept, carried = one - alpha[head, at], eta[head, at]
                m = carried * m
                beta = kept * beta
                f = kept * f + m
                for j in range(t):
                    n[j] = carried * n[j]
                    G[j] = kept * G[j] + n[j]
                n[t] = theta[head, at]
                G[t] = theta[head, at]
            if not before:
                rows[head, piece, t, 0] = beta
                rows[head, piece, t, 1] = m
                rows[head, piece, t, 2] = f
                G_rows[head, piece, t] = G
                if n_rows.size:
                    n_rows[head, piece, t] = n
        end[head, piece, 0] = beta
        end[head, piece, 1] = m
        end[head, piece, 2] = f
        end_n[head, piece] = n
        end_G[head, piece] = G


@njit(cache=True, nogil=True, parallel=True)
def _scalars_backward(
    theta: Any, eta: Any, alpha: Any, stored: Any, rows: Any, n_rows: Any, G_rows: Any, drows: Any,
    dn_rows: Any, dG_rows: Any, dend: Any, dend_n: Any, dend_G: Any, out: Any, starts: Any,
    lengths: Any, size: int, before: bool,
) -> None:  # fmt: skip
    count = len(starts)
    for program in prange(theta.shape[0] * count):
        head, piece = program // count, program % count
        start, length = starts[piece], lengths[piece]
        one = theta.dtype.type(1)
        ubeta, um, uf = dend[head, piece, 0], dend[head, piece, 1], dend[head, piece, 2]
        un = dend_n[head, piece].copy()
        uG = dend_G[head, piece].copy()
        for step in range(length):
            t = length - 1 - step
            at = start + t
            if not before:
                ubeta += drows[head, piece, t, 0]
                um += drows[head, piece, t, 1]
                uf += drows[head, piece, t, 2]
                for j in range(t + 1):
                    uG[j] += dG_rows[head, piece, t, j]
                    if dn_rows.size:
                        un[j] += dn_rows[head, piece, t, j]
            if stored.size == 0 or stored[head, at] != 0:
                kept, carried = one - alpha[head, at], eta[head, at]
                um += uf
                deta = um * rows[head, piece, t, 1]
                lost = ubeta * rows[head, piece, t, 0] + uf * rows[head, piece, t, 2]
                out[0, head, at] = un[t] + uG[t]
                for j in range(t):
                    un[j] += uG[j]
                    deta += un[j] * n_rows[head, piece, t, j]
                    lost += uG[j] * G_rows[head, piece, t, j]
                    un[j] *= carried
                    uG[j] *= kept
                out[1, head, at] = deta
                out[2, head, at] = -lost
                ubeta *= kept
                um *= carried
                uf *= kept
            else:
                out[0, head, at] = 0
                out[1, head, at] = 0
                out[2, head, at] = 0
            if before:
                ubeta += drows[head, piece, t, 0]
                um += drows[head, piece, t, 1]
                uf += drows[head, piece, t, 2]
                for j in range(t):
                    uG[j] += dG_rows[head, piece, t, j]
                    if dn_rows.size:
                        un[j] += dn_rows[head, piece, t, j]


def _given(rates: Rates) -> tuple[Any, ...]:
    stored = np.zeros((0, 0), np.int8) if rates.stored is None else rates.stored.numpy()
    return rates.theta.numpy(), rates.eta.numpy(), rates.alpha.numpy(), stored


def _places(rates: Rates, pieces: Pieces) -> tuple[Any, ...]:
    return tuple(x.numpy() for x in pieces.places(rates.theta.device))


def _matrices(x: Tensor) -> Any:
    return x.reshape(0, 0, 0, 0).numpy() if x.dim() == 1 else x.numpy()


def scalars(rates: Rates, pieces: Pieces, before: bool, with_n: bool = False) -> Scalars:
    """The coefficients of all pieces; rows are those `before` their token, or behind it."""
    of = Scalars.empty(rates.theta, pieces, with_n)
    if not of.rows.numel():
        return of
    count_launch()
    kernel: Any = _scalars
    kernel(
        *_given(rates), of.rows.numpy(), _matrices(of.n), of.G.numpy(), of.end.numpy(),
        of.end_n.numpy(), of.end_G.numpy(), *_places(rates, pieces), pieces.size, before,
    )  # fmt: skip
    return of


def scalars_backward(rates: Rates, pieces: Pieces, before: bool, d: Scalars) -> Tensor:
    """The gradients (3, heads, tokens) of theta, eta, alpha from those of `scalars`."""
    out = rates.theta.new_empty(3, *rates.theta.shape)
    if not out.numel():
        return out
    of = scalars(rates, pieces, before=True, with_n=True)
    count_launch()
    kernel: Any = _scalars_backward
    kernel(
        *_given(rates), of.rows.numpy(), of.n.numpy(), of.G.numpy(),
        *(_matrices(x.contiguous()) if x.dim() in (1, 4) else x.contiguous().numpy()
          for x in (d.rows, d.n, d.G, d.end, d.end_n, d.end_G)),
        out.numpy(), *_places(rates, pieces), pieces.size, before,
    )  # fmt: skip
    return out


@njit(cache=True, nogil=True, parallel=True)
def _path(
    gradients: Any, eta: Any, alpha: Any, momentum: Any, path: Any, heads: int, chunks: int
) -> None:
    width = path.shape[2]
    for program in prange(heads):
        for chunk in range(chunks):
            carried, kept = eta[program, chunk], 1 - alpha[program, chunk]
            for i in range(width):
                s = carried * momentum[program, i] - gradients[program, chunk, i]
                momentum[program, i] = s
                path[program, chunk + 1, i] = kept * path[program, chunk, i] + s


@njit(cache=True, nogil=True, parallel=True)
def _path_backward(
    dpath: Any, gradients: Any, eta: Any, alpha: Any, path: Any, first: Any, dmomentum: Any,
    dweights: Any, dgradients: Any, drates: Any, heads: int, chunks: int,
) -> None:  # fmt: skip
    width = path.shape[2]
    for program in prange(heads):
        # The momentum before each chunk waits where its gradient will be written.
        for i in range(width):
            s = first[program, i]
            for chunk in range(chunks):
                dgradients[program, chunk, i] = s
                s = eta[program, chunk] * s - gradients[program, chunk, i]
        for step in range(chunks):
            chunk = chunks - 1 - step
            carried, kept = eta[program, chunk], 1 - alpha[program, chunk]
            deta, dalpha = 0.0, 0.0
            for i in range(width):
                dw = dweights[program, i] + dpath[program, chunk + 1, i]
                ds = dmomentum[program, i] + dw
                deta += ds * dgradients[program, chunk, i]
                dalpha -= dw * path[program, chunk, i]
                dgradients[program, chunk, i] = -ds
                dmomentum[program, i] = carried * ds
                dweights[program, i] = kept * dw
            drates[0, program, chunk] = deta
            drates[1, program, chunk] = dalpha
        for i in range(width):
            dweights[program, i] += dpath[program, 0, i]


def path(W: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor) -> Any:
    """The weights (heads, chunks + 1, width) before and behind every chunk, and the last momentum.

    W, S (heads, width), gradients (heads, chunks, width), eta, alpha (heads, chunks).
    """
    heads, chunks, width = gradients.shape
    out, momentum = W.new_empty(heads, chunks + 1, width), S.clone()
    out[:, 0] = W
    count_launch()
    _path(
        gradients.numpy(), eta.numpy(), alpha.numpy(), momentum.numpy(), out.numpy(), heads, chunks
    )
    return out, momentum


def path_backward(
    dpath: Tensor, dS: Tensor, S: Tensor, gradients: Tensor, eta: Tensor, alpha: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dW, dS, dgradients, deta, dalpha of `path`."""
    heads, many, _ = out.shape
    dmomentum, dW = dS.clone(), torch.zeros_like(S)
    dgradients = torch.empty_like(gradients)
    drates = out.new_zeros(2, heads, many - 1)
    count_launch()
    _path_backward(
        dpath.numpy(), gradients.numpy(), eta.numpy(), alpha.numpy(), out.numpy(), S.numpy(),
        dmomentum.numpy(), dW.numpy(), dgradients.numpy(), drates.numpy(), heads, many - 1,
    )  # fmt: skip
    deta, dalpha = (x.clone() for x in drates)
    return dW, dmomentum, dgradients, deta, dalpha
