"""MASFormer, the gradients of its layers (S13 of `masformer`)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.patterns.masformer_spans import Span, check_sizes, check_span
from attnspec.reference.patterns.masformer_tiles import differentiate_tiles

Gradients = tuple[np.ndarray, np.ndarray, np.ndarray]


def block_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    b: int,
    n: int = 0,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Gradients:
    """S13: gradients dq, dk, dv of `block_attend`, shaped as q, k, v.

    `dout` (..., H, T, dv) and `dlse` (..., H, T) are upstream; no `dlse` means lse is not used.

    >>> one = np.ones((1, 4, 1))
    >>> block_attend_backward(one, one, one, one, 2)[2].ravel()
    array([1.5, 0.5, 1.5, 0.5])
    """
    check_sizes(("block", b, n))
    return differentiate_tiles(q, k, v, dout, dlse, ("block", b, n), causal, scale, lengths)


def window_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    w: int,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Gradients:
    """S13: gradients dq, dk, dv of `window_attend`, with `dout` and `dlse` as in blocks.

    >>> one = np.ones((1, 3, 1))
    >>> window_attend_backward(one, one, one, one, 0)[2].ravel()
    array([1., 1., 1.])
    """
    check_sizes(("window", w))
    return differentiate_tiles(q, k, v, dout, dlse, ("window", w), causal, scale, lengths)


def layer_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    span: Span,
    causal: bool = True,
    scale: float | None = None,
    *,
    lengths: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Gradients:
    """S13: gradients dq, dk, dv of `layer_attend`, with `dout` and `dlse` as in blocks.

    >>> one = np.ones((1, 2, 1))
    >>> layer_attend_backward(one, one, one, one, ("full",))[2].ravel()
    array([1.5, 0.5])
    """
    check_span(span)
    return differentiate_tiles(q, k, v, dout, dlse, span, causal, scale, lengths)
