"""MASFormer, attention tile by tile: queries that share a range of keys, and their gradients.

The clauses are those of `masformer`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_attention_inputs,
    check_bool,
    check_lengths,
    check_shaped,
    check_size,
)
from attnspec.reference.dense.attention import attend, attend_backward
from attnspec.reference.patterns.masformer_spans import Span, sees
from attnspec.reference.scores.tempscale_steps import check_positive


def tiles(T: int, span: Span, causal: bool) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """S2-S4: queries, the keys that some of them see, and bool (queries, keys) who sees whom.

    A tile is a block, or as many queries as a causal row of a window has keys.

    >>> [(rows.start, keys.start, keys.stop) for rows, keys, _ in tiles(5, ("block", 2, 1), True)]
    [(0, 0, 2), (2, 0, 4), (4, 2, 5)]
    """
    size, reach = T, 0
    if span[0] == "block":
        size, reach = span[1], span[1] * span[2]
    elif span[0] == "window":
        size, reach = span[1] + 1, span[1]
    for first in range(0, T, max(size, 1)):
        last = min(first + size, T)
        keys = slice(max(first - reach, 0), last if causal else min(first + size + reach, T))
        t, u = np.arange(first, last), np.arange(keys.start, keys.stop)
        yield slice(first, last), keys, sees(t[:, None], u, span, causal)


def attend_tiles(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    span: Span,
    causal: bool,
    scale: float | None,
    lengths: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """S5, S6: output (..., H, T, dv) and lse (..., H, T) of a layer, without a T x T array.

    >>> q, v = np.zeros((1, 3, 1)), np.array([[[1.0], [3.0], [5.0]]])
    >>> attend_tiles(q, q, v, ("window", 1), True, None, None)[0].ravel()
    array([1., 2., 4.])
    """
    check_inputs(q, k, v, causal, scale, lengths)
    out, lse = np.zeros_like(q, shape=(*q.shape[:-1], v.shape[-1])), np.zeros_like(q[..., 0])
    for rows, keys, seen in tiles(q.shape[-2], span, causal):
        out[..., rows, :], lse[..., rows] = attend(
            q[..., rows, :], k[..., keys, :], v[..., keys, :],
            mask=seen & real_pairs(lengths, rows, keys), scale=scale,
        )  # fmt: skip
    return out, lse


def differentiate_tiles(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    dlse: np.ndarray | None,
    span: Span,
    causal: bool,
    scale: float | None,
    lengths: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S13: gradients dq, dk, dv of `attend_tiles`; a key's are summed over the tiles that read it.

    >>> one = np.ones((1, 3, 1))
    >>> differentiate_tiles(one, one, one, one, None, ("window", 1), True, None, None)[2].ravel()
    array([1.5, 1. , 0.5])
    """
    check_inputs(q, k, v, causal, scale, lengths)
    check_upstream(q, v, dout, dlse)
    if lengths is not None:
        # What is padded is not read, whatever it holds (K11).
        real = (np.arange(q.shape[-2]) < lengths[..., None])[..., None, :, None]
        q, dout = (np.where(real, x, np.zeros_like(x)) for x in (q, dout))
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for rows, keys, seen in tiles(q.shape[-2], span, causal):
        dq[..., rows, :], from_keys, from_values = attend_backward(
            q[..., rows, :], k[..., keys, :], v[..., keys, :], dout[..., rows, :],
            None if dlse is None else dlse[..., rows],
            mask=seen & real_pairs(lengths, rows, keys), scale=scale,
        )  # fmt: skip
        dk[..., keys, :] += from_keys
        dv[..., keys, :] += from_values
    return dq, dk, dv


def real_pairs(lengths: np.ndarray | None, rows: slice, keys: slice) -> np.ndarray:
    """S6: bool (..., 1, rows, keys), the pairs of which neither is padding.

    >>> real_pairs(np.array(3), slice(2, 4), slice(1, 4)).astype(int)
    array([[[1, 1, 0],
            [0, 0, 0]]])
    """
    if lengths is None:
        return np.ones((1, 1, 1), bool)
    ends = lengths[..., None, None, None]
    t, u = np.arange(rows.start, rows.stop)[:, None], np.arange(keys.start, keys.stop)
    return (t < ends) & (u < ends)


def check_inputs(q: Any, k: Any, v: Any, causal: Any, scale: Any, lengths: Any) -> None:
    """K14: one text's q, k and v, and options that fit them.

    >>> check_inputs(*(np.zeros((1, n, 2)) for n in (2, 3, 3)), True, None, None)
    Traceback (most recent call last):
    ValueError: k: got 3, expected 2 (tokens, as in q: a cache is for decode_step)
    """
    check_attention_inputs(q, k, v)
    T = q.shape[-2]
    check_size("k", k.shape[-2], T, "tokens, as in q: a cache is for decode_step")
    check_bool("causal", causal)
    check_scale(scale)
    if lengths is not None:
        check_lengths(lengths, q.shape[:-3], T)


def check_scale(scale: Any) -> None:
    """K14: `scale` is None or a number above 0.

    >>> check_scale(0)
    Traceback (most recent call last):
    ValueError: scale: got 0, expected a finite number > 0
    """
    if scale is not None:
        check_positive("scale", scale)


def check_upstream(q: np.ndarray, v: np.ndarray, dout: Any, dlse: Any) -> None:
    """K14: gradients shaped as the output and, if it is used, as lse.

    >>> check_upstream(np.ones((1, 3, 2)), np.ones((1, 3, 4)), np.ones((1, 3, 2)), None)
    Traceback (most recent call last):
    ValueError: dout: got shape (1, 3, 2), expected (1, 3, 4)
    """
    expected = (*q.shape[:-1], v.shape[-1])
    upstream = [("dout", dout, expected)]
    if dlse is not None:
        upstream.append(("dlse", dlse, expected[:-1]))
    for name, x, shape in upstream:
        check_shaped(name, x, shape)
