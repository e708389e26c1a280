"""What the chunk forms of Titans share: tokens in order, one chunk at a time.

The clauses S7 to S9, S19 and S20 of `titans`. A chunk reads and leaves its weights by a few
products; the linear memory and the deep one differ only in how many layers do so.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
    group_size,
)
from attnspec.reference.linear.titans_coefficients import Coefficients, check_rates, coefficients
from attnspec.reference.linear.titans_memory import check_layers, check_scale
from attnspec.reference.primitives.gelu import gelu

Layers = tuple[np.ndarray, ...]
READS = ("inclusive", "exclusive")


class Tokens(NamedTuple):
    """S19: tokens in the order in which they count, those that are not stored last."""

    k: np.ndarray  # (..., kv_heads, T, d)
    v: np.ndarray  # (..., kv_heads, T, dv)
    q: np.ndarray  # (..., heads, T, d)
    rates: tuple[np.ndarray, np.ndarray, np.ndarray]  # each (..., kv_heads, T)
    stored: np.ndarray | None  # (..., 1, T), None if all are
    order: np.ndarray | None  # (..., 1, T): where each was

    def chunks(self, b: int) -> Iterator[tuple[slice, Tokens]]:
        """S4: the tokens of each gradient chunk of b."""
        for start in range(0, self.k.shape[-2], b):
            rows = slice(start, min(start + b, self.k.shape[-2]))
            k, v, q = (x[..., rows, :] for x in (self.k, self.v, self.q))
            theta, eta, alpha = (x[..., rows] for x in self.rates)
            stored = None if self.stored is None else self.stored[..., rows]
            yield rows, Tokens(k, v, q, (theta, eta, alpha), stored, None)

    def coefficients(self) -> Coefficients:
        """S6 of these tokens."""
        theta = self.rates[0]
        stored = None if self.stored is None else np.broadcast_to(self.stored, theta.shape)
        return coefficients(*self.rates, stored)

    def back(self, rows: np.ndarray) -> np.ndarray:
        """Rows (..., heads, T, width) where they were, 0 for what was not stored."""
        if self.order is None or self.stored is None:
            return rows
        rows = np.where(self.stored[..., None], rows, 0.0).astype(rows.dtype)
        return np.take_along_axis(rows, np.argsort(self.order, axis=-1)[..., None], axis=-2)


def in_order(
    k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: tuple[np.ndarray, ...],
    valid: np.ndarray | None,
) -> Tokens:  # fmt: skip
    """S19: the tokens as `Tokens`; what is kept at a padded one is not read (K11).

    >>> x = np.array([[[np.nan], [1.0]]])
    >>> in_order(x, x, x, (x[..., 0],) * 3, np.array([False, True])).k.ravel()
    array([1., 0.])
    """
    theta, eta, alpha = rates
    if valid is None:
        return Tokens(k, v, q, (theta, eta, alpha), None, None)
    order = np.argsort(~valid, axis=-1, kind="stable")[..., None, :]
    stored = np.take_along_axis(valid[..., None, :], order, axis=-1)

    def sort(x: np.ndarray, at: np.ndarray, real: np.ndarray, axis: int) -> np.ndarray:
        return np.where(real, np.take_along_axis(x, at, axis=axis), 0.0).astype(x.dtype)

    rows = [sort(x, order[..., None], stored[..., None], -2) for x in (k, v, q)]
    theta, eta, alpha = (sort(x, order, stored, -1) for x in rates)
    return Tokens(rows[0], rows[1], rows[2], (theta, eta, alpha), stored, order)


class Reads(NamedTuple):
    """S5, S20: coefficients of the rows a chunk reads, its tokens once for each grouped head."""

    beta: np.ndarray  # (..., group * C, 1)
    f: np.ndarray  # (..., group * C, 1)
    G: np.ndarray  # (..., group * C, C)


def reading(of: Coefficients, read: str, group: int) -> Reads:
    """S5: what token t reads, W_t or, if `read` is "exclusive", W_{t-1}.

    >>> from attnspec.reference.linear.titans_coefficients import titans_coefficients
    >>> one = np.ones(2)
    >>> reading(titans_coefficients(one, one, 0 * one), "exclusive", 1).f.ravel()
    array([0., 1.])
    """
    beta, f, G = of.beta[..., None], of.f[..., None], of.G
    if read == "exclusive":
        beta = np.concatenate([np.ones_like(beta[..., :1, :]), beta[..., :-1, :]], axis=-2)
        f, G = (np.concatenate([0 * x[..., :1, :], x[..., :-1, :]], axis=-2) for x in (f, G))
    return Reads(*(np.concatenate([x] * group, axis=-2) for x in (beta, f, G)))


def fold(q: np.ndarray, kv_heads: int) -> np.ndarray:
    """S20: (..., heads, C, d) to (..., kv_heads, group * C, d), as a shared memory reads them.

    >>> fold(np.ones((4, 3, 2)), 2).shape
    (2, 6, 2)
    """
    *leading, heads, C, d = q.shape
    return q.reshape(*leading, kv_heads, heads // kv_heads * C, d)


def read_chunk(W: Layers, S: Layers, H: Layers, Delta: Layers, A: np.ndarray, of: Reads) -> Any:
    """S9: the rows A through all layers, each row by weights that are never formed.

    >>> one = np.ones((1, 1))
    >>> read_chunk((one,), (one,), (one,), (one,), one, Reads(one, one, one)).ravel()
    array([1.])
    """
    for layer, (weights, momentum, h, delta) in enumerate(zip(W, S, H, Delta, strict=True)):
        if layer:
            A = gelu(A)
        scores = (A @ np.swapaxes(h, -1, -2)) * of.G
        A = of.beta * (A @ weights) + of.f * (A @ momentum) - scores @ delta
    return A


def end_chunk(
    W: Layers, S: Layers, H: Layers, Delta: Layers, of: Coefficients
) -> tuple[Layers, Layers]:
    """S8, S9: the weights and the momentum behind the chunk's last token.

    >>> from attnspec.reference.linear.titans_coefficients import titans_coefficients
    >>> one = np.ones((1, 1))
    >>> end_chunk((one,), (one,), (one,), (one,), titans_coefficients(*np.ones((3, 1))))
    ((array([[0.]]),), (array([[0.]]),))
    """
    beta, m, f = (x[..., -1, None, None] for x in (of.beta, of.m, of.f))
    n, G = (x[..., -1, :, None] for x in (of.n, of.G))
    layers = list(zip(W, S, H, Delta, strict=True))
    return (
        tuple(beta * w + f * s - np.swapaxes(h, -1, -2) @ (G * e) for w, s, h, e in layers),
        tuple(m * s - np.swapaxes(h, -1, -2) @ (n * e) for _, s, h, e in layers),
    )


def check_memory_inputs(
    W0: Any, S0: Any, k: Any, v: Any, q: Any, rates: Any, b: Any, loss_scale: Any, read: Any,
    valid: Any,
) -> tuple[Layers, Layers, Tokens]:  # fmt: skip
    """K14: W0 and S0 with the leading axes of k, and the tokens in order.

    >>> check_memory_inputs((), None, *[np.ones((1, 1, 1))] * 3, (1, 1, 1), 1, 2, "inclusive", None)
    Traceback (most recent call last):
    ValueError: W0: got no layer, expected one or more
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    group_size(q.shape[-3], k.shape[-3])
    W, S = check_states(W0, S0, k)
    check_size("v", v.shape[-1], W[-1].shape[-1], "dv, the width of the last layer of W0")
    check_integer("b", b, least=1)
    check_scale(loss_scale)
    check_choice("read", read, READS)
    if valid is not None:
        check_array("valid", valid, ("T",), dtype="bool")
        expected = (*k.shape[:-3], k.shape[-2])
        if valid.shape != expected:
            raise ValueError(f"valid: got shape {valid.shape}, expected {expected}")
    return W, S, in_order(k, v, q, token_rates(rates, k, valid), valid)


def check_states(W0: Any, S0: Any, k: np.ndarray) -> tuple[Layers, Layers]:
    """S3, K14: weights and momentum of every layer, (..., inputs, outputs) as k has leading axes.

    >>> check_states((np.ones((1, 1)),), None, np.ones((3, 2, 1)))[1][0].shape
    (3, 1, 1)
    """
    check_layers("W0", W0, k, "k")
    W = tuple(np.broadcast_to(w, (*k.shape[:-2], *w.shape[-2:]), subok=True) for w in W0)
    if S0 is None:
        return W, tuple(np.zeros_like(w) for w in W)
    check_layers("S0", S0, k, "k")
    if [s.shape[-2:] for s in S0] != [w.shape[-2:] for w in W]:
        shapes = [s.shape for s in S0]
        raise ValueError(f"S0: got shapes {shapes}, expected those of W0, {[w.shape for w in W]}")
    return W, tuple(np.broadcast_to(s, w.shape, subok=True) for s, w in zip(S0, W, strict=True))


def token_rates(
    rates: Any, k: np.ndarray, valid: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S3, K14: theta, eta, alpha (..., kv_heads, T); a number is that of every token.

    >>> token_rates((0.5, np.ones((1, 2)), 0), np.ones((1, 2, 3)))[0]
    array([[0.5, 0.5]])
    """
    if not isinstance(rates, (tuple, list)):
        raise TypeError(f"rates: got {type(rates).__name__}, expected a tuple of three")
    if len(rates) != 3:
        raise ValueError(f"rates: got {len(rates)}, expected three: theta, eta, alpha")
    full = []
    for name, x in zip(("theta", "eta", "alpha"), rates, strict=True):
        if isinstance(x, (int, float)) and not isinstance(x, bool):
            x = np.full_like(k, x, shape=k.shape[:-1])
        check_array(f"rates.{name}", x, ("kv_heads", "T"))
        if x.dtype != k.dtype:
            raise TypeError(f"rates.{name}: got dtype {x.dtype}, expected {k.dtype}, as k")
        if x.shape != k.shape[:-1]:
            raise ValueError(f"rates.{name}: got shape {x.shape}, expected {k.shape[:-1]}")
        full.append(x)
    seen = [x if valid is None else np.where(valid[..., None, :], x, 0.0) for x in full]
    check_rates(seen[0], seen[1], seen[2], prefix="rates.")
    return full[0], full[1], full[2]
