"""Neighborhood attention in two matrix products with the weights in between, in window order.

The clauses are those of `neighborhood`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_size, default_scale, group_size
from attnspec.reference.dense.attention import combine, score
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.patterns.neighborhood_windows import Flags, Sizes, window_tokens


def na_qk(
    q: np.ndarray,
    k: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    scale: float | None = None,
) -> np.ndarray:
    """S8: scores (..., heads, tokens, window) of q (..., heads, tokens, d) and k (..., kv_heads,
    tokens, d), in window order; -inf behind the end of a causal axis.

    >>> x = np.array([[[1.0], [2.0], [3.0]]])
    >>> na_qk(x, x, (3,), 2, causal=True)
    array([[[  1., -inf],
            [  2.,   4.],
            [  6.,   9.]]])
    """
    index, inside = _windows(q, "q", shape, kernel, stride, dilation, causal)
    check_fit("k", k, "q", q)
    check_size("k", k.shape[-1], q.shape[-1], "d, as in q")
    s = _in_window_order(score(q, k, scale=scale), index)
    return np.where(inside, s, np.full_like(s, -np.inf))


def na_qk_backward(
    q: np.ndarray,
    k: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    dscores: np.ndarray,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: dq and dk, shaped as q and k; the gradient of an entry that is -inf is not read.

    >>> x = np.ones((1, 3, 1))
    >>> na_qk_backward(x, x, (3,), 2, np.ones((1, 3, 2)), causal=True)[1].ravel()
    array([2., 2., 1.])
    """
    index, inside = _windows(q, "q", shape, kernel, stride, dilation, causal)
    check_fit("k", k, "q", q)
    check_window("dscores", dscores, q, index.shape[1])
    factor = default_scale(q.shape[-1]) if scale is None else scale
    ds = factor * _over_tokens(dscores, index, inside)
    return combine(ds, k), sum_groups(np.swapaxes(ds, -1, -2) @ q, k.shape[-3])


def na_av(
    p: np.ndarray,
    v: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
) -> np.ndarray:
    """S8: outputs (..., heads, tokens, dv) of weights p (..., heads, tokens, window), in window
    order, and v (..., kv_heads, tokens, dv); weights behind the end of a causal axis are not read.

    >>> na_av(np.full((1, 3, 2), 0.5), np.array([[[2.0], [4.0], [6.0]]]), (3,), 2)
    array([[[3.],
            [3.],
            [5.]]])
    """
    index, inside = _windows(p, "p", shape, kernel, stride, dilation, causal)
    check_fit("v", v, "p", p)
    check_window("p", p, p, index.shape[1])
    return combine(_over_tokens(p, index, inside), v)


def na_av_backward(
    p: np.ndarray,
    v: np.ndarray,
    shape: Sequence[int],
    kernel: Sizes,
    dout: np.ndarray,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    causal: Flags = False,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: dp and dv, shaped as p and v; dp is 0 where the weight is not read.

    >>> na_av_backward(np.ones((1, 3, 2)), np.ones((1, 3, 1)), (3,), 2, np.ones((1, 3, 1)))[1]
    array([[[2.],
            [3.],
            [1.]]])
    """
    index, inside = _windows(p, "p", shape, kernel, stride, dilation, causal)
    check_fit("v", v, "p", p)
    check_window("p", p, p, index.shape[1])
    check_array("dout", dout, ("heads", "tokens", "dv"))
    dp = _in_window_order(score(dout, v, scale=1.0), index)
    P = _over_tokens(p, index, inside)
    dv = sum_groups(np.swapaxes(P, -1, -2) @ dout, v.shape[-3])
    return np.where(inside, dp, np.zeros_like(dp)), dv


def check_fit(name: str, x: Any, other_name: str, other: np.ndarray) -> None:
    """K1, K7, K14: the keys or values `x` fit the queries, or weights, `other`.

    >>> check_fit("k", np.ones((2, 4, 1)), "q", np.ones((3, 4, 1)))
    Traceback (most recent call last):
    ValueError: k: got 2 kv heads for 3 query heads, expected a divisor of 3
    """
    check_array(name, x, ("kv_heads", "tokens", "width"))
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as {other_name}")
    if x.shape[:-3] != other.shape[:-3]:
        raise ValueError(
            f"{name}: got leading axes {x.shape[:-3]}, expected {other.shape[:-3]}, as {other_name}"
        )
    check_size(name, x.shape[-2], other.shape[-2], f"tokens, as in {other_name}")
    try:
        group_size(other.shape[-3], x.shape[-3])
    except ValueError as error:
        raise ValueError(str(error).replace("k:", f"{name}:", 1)) from None


def check_window(name: str, x: Any, rows: np.ndarray, window: int) -> None:
    """S8, K14: `x` has an entry for each of the `window` keys of every row of `rows`.

    >>> check_window("p", np.ones((1, 3, 5)), np.ones((1, 3, 5)), 4)
    Traceback (most recent call last):
    ValueError: p: got shape (1, 3, 5), expected (1, 3, 4)
    """
    check_array(name, x, ("heads", "tokens", "window"))
    expected = (*rows.shape[:-1], window)
    if x.shape != expected:
        raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")


def _windows(
    x: Any, name: str, shape: Any, kernel: Any, stride: Any, dilation: Any, causal: Any
) -> tuple[np.ndarray, np.ndarray]:
    check_array(name, x, ("heads", "tokens", "width"))
    index, inside = window_tokens(shape, kernel, stride=stride, dilation=dilation, causal=causal)
    check_size(name, x.shape[-2], len(index), "tokens, as in shape")
    return index, inside


def _in_window_order(x: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(..., tokens, tokens) to (..., tokens, window)."""
    return x[..., np.arange(len(index))[:, None], index]


def _over_tokens(x: np.ndarray, index: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """(..., tokens, window) to (..., tokens, tokens), 0 for what is not in the window."""
    tokens, _ = index.shape
    spread = np.zeros_like(x, shape=(*x.shape[:-1], tokens))
    row, entry = np.nonzero(inside)
    spread[..., row, index[row, entry]] = x[..., row, entry]
    return spread
