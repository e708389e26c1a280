"""The steps around RCMHA's attention: heads, convolutions, scores as matrices, and the memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import FLOATS, check_integer, check_size, check_tensor, product, wide
from attnspec.fast.engines.filters import causal_filter
from attnspec.fast.engines.weights import average
from attnspec.fast.scores.rcmha_checks import check_heads, check_like, check_memory, check_tables


def project_heads(x: Tensor, W: Tensor, b: Tensor | None, heads: int) -> Tensor:
    """x (batch, T, D) times W (D, D) plus b (D,) if any, as a view (batch, heads, T, D / heads)."""
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    D = x.shape[2]
    check_like("W", W, x, (D, D))
    check_integer("heads", heads, least=1)
    if D % heads:
        raise ValueError(f"heads: got {heads}, expected a divisor of D = {D}")
    y = product(x, W)
    if b is not None:
        check_like("b", b, x, (D,))
        y = y + b
    return y.unflatten(-1, (heads, D // heads)).transpose(1, 2)


def depthwise_causal_conv(
    p: Tensor, w: Tensor, b: Tensor, state: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel of p (batch, heads, T, dk) mixed with its K - 1 predecessors, and the new state.

    w (dk, K) and b (dk,) serve all heads, w[:, K - 1] is the tap of the token itself; `state`
    (batch, heads, K - 1, dk) holds the rows before p, None zeros. Differentiable in all of them.
    """
    y = causal_filter(p, w, b, state, backend=backend)
    past, T = w.shape[1] - 1, p.shape[2]
    if past <= T:
        return y, p[:, :, T - past :].clone()
    older = pad(p, (0, 0, past - T, 0)) if state is None else torch.cat([state[:, :, T:], p], 2)
    return y, older


def relative_shift(Bmat: Tensor) -> Tensor:
    """(batch, heads, T, S) with result[i, j] = Bmat[i, T + j - i], Bmat having S + T columns."""
    check_tensor("Bmat", Bmat, ("batch", "heads", "T", "S + T"), FLOATS)
    T, columns = Bmat.shape[2:]
    if columns < 2 * T:
        raise ValueError(f"Bmat: got {columns} columns, expected at least 2 T = {2 * T}")
    flat = pad(Bmat, (0, 1)).flatten(2)[..., : T * columns]
    return flat.unflatten(-1, (T, columns))[..., T:]


def content_scores(q: Tensor, u: Tensor, k: Tensor) -> Tensor:
    """(q_i + u) . k_j, unscaled, (batch, heads, T, S).

    q (batch, heads, T, dk), u (heads, dk), k (batch, heads, S, dk).
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    check_like("u", u, q, (q.shape[1], q.shape[3]))
    check_heads("k", k, q)
    check_size("k", k.shape[3], q.shape[3], "dk, as in q")
    return product(wide(q) + wide(u)[:, None], wide(k).mT).to(q.dtype)


def relative_scores(q: Tensor, R: Tensor, b: Tensor, M: int) -> Tensor:
    """q_i . R_r + b_r at r = P + (j - M) - i, unscaled, (batch, heads, T, M + T).

    q (batch, heads, T, dk), R (2 P, heads, dk), b (2 P, heads), `M` tokens of memory before the T.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    check_integer("M", M, least=0)
    T = q.shape[2]
    P = check_tables(R, b, q, q.shape[1], q.shape[3], M + T)
    rows = slice(P - (M + T), P + T)
    products = product(wide(q), wide(R[rows]).permute(1, 2, 0))
    return relative_shift(products + wide(b[rows]).T[:, None]).to(q.dtype)


def memory_mask(T: int, M: int) -> Tensor:
    """bool (T, M + T) on the CPU, True = visible: all of the memory, and j - M <= i."""
    check_integer("T", T, least=0)
    check_integer("M", M, least=0)
    return torch.arange(M + T)[None, :] - M <= torch.arange(T)[:, None]


def attend(scores: Tensor, mask: Tensor | None, v: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (batch, heads, T, dv) and weights (batch, heads, T, S) of scaled scores.

    `mask` is bool (T, S), True = visible, None all; v (batch, heads, S, dv).
    """
    check_tensor("scores", scores, ("batch", "heads", "T", "S"), FLOATS)
    check_heads("v", v, scores)
    check_size("v", v.shape[2], scores.shape[3], "S, as in scores")
    if mask is not None:
        check_tensor("mask", mask, ("T", "S"), (torch.bool,))
        if mask.shape != scores.shape[2:]:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {tuple(scores.shape[2:])}"
            )
        scores = torch.where(mask.to(scores.device), scores, -float("inf"))
    return average(scores, v)


def update_memory(old: Tensor | None, new: Tensor, mem_len: int) -> Tensor:
    """The last `mem_len` tokens of old (batch, M, D), or none, and new (batch, T, D), detached."""
    check_tensor("new", new, ("batch", "T", "D"), FLOATS)
    check_integer("mem_len", mem_len, least=0)
    kept = new
    if old is not None:
        check_memory("old", old, new)
        kept = torch.cat([old, new], 1)
    return kept[:, max(kept.shape[1] - mem_len, 0) :].detach().clone()
