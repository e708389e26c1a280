"""Based's other layers and their order: the clauses S10 to S12 of `based`."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_shaped,
    check_size,
)
from attnspec.reference.dense.attention import attend
from attnspec.reference.dense.attention_gradient import attend_backward
from attnspec.reference.primitives.sigmoid import silu

PATTERNS = {
    27: ((1, 6, 11, 16, 21), (2, 7, 12, 17, 22)),
    36: ((1, 6, 11, 16, 21, 27, 33), (2, 7, 12, 17, 22, 28, 34)),
}
"""S12: the linear and the window layers of a model with so many layers; the others convolve."""


def sliding_window_attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, left: int) -> np.ndarray:
    """S10: o (..., heads, q_tokens, dv) of softmax attention to the last left + 1 keys.

    >>> x, v = np.zeros((1, 3, 1)), np.array([[[1.0], [3.0], [5.0]]])
    >>> sliding_window_attend(x, x, v, 1).ravel()
    array([1., 2., 4.])
    """
    return attend(q, k, v, causal=True, mask=_window(q, k, v, left))[0]


def sliding_window_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, left: int, do: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S10: dq, dk, dv of `sliding_window_attend`; do (..., heads, q_tokens, dv).

    >>> x, v = np.zeros((1, 3, 1)), np.array([[[1.0], [3.0], [5.0]]])
    >>> sliding_window_backward(x, x, v, 1, np.ones_like(v))[2].ravel()
    array([1.5, 1. , 0.5])
    """
    mask = _window(q, k, v, left)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    return attend_backward(q, k, v, do, causal=True, mask=mask)


def _window(q: np.ndarray, k: np.ndarray, v: np.ndarray, left: int) -> np.ndarray:
    """S10: True (q_tokens, k_tokens) where a key is not too old for a query (later ones aside)."""
    check_attention_inputs(q, k, v)
    check_integer("left", left, least=0)
    place = np.arange(q.shape[-2])[:, None] + k.shape[-2] - q.shape[-2]
    return np.arange(k.shape[-2]) >= place - left


def gated_convolution(
    x: np.ndarray, W_in: np.ndarray, filters: np.ndarray, W_out: np.ndarray
) -> np.ndarray:
    """S11: y (..., tokens, width) of x (..., tokens, width).

    W_in (width, 2 inner), W_out (inner, width), filters (inner, taps): the last tap meets the token
    itself, the one before it the token before.

    >>> one = np.ones((1, 1))
    >>> gated_convolution(np.array([[1.0], [2.0]]), np.ones((1, 2)), np.array([[0.0, 1.0]]), one)
    array([[0.73105858],
           [3.52318831]])
    """
    check_array("x", x, ("tokens", "width"))
    for name, weight, axes in (
        ("W_in", W_in, ("width", "2 inner")),
        ("filters", filters, ("inner", "taps")),
        ("W_out", W_out, ("inner", "width")),
    ):
        check_array(name, weight, axes)
        if weight.ndim != 2:
            raise ValueError(f"{name}: got shape {weight.shape}, expected ({', '.join(axes)})")
        if weight.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {weight.dtype}, expected {x.dtype}, as x")
    inner, taps = filters.shape
    check_size("W_in", W_in.shape[0], x.shape[-1], "width, as in x")
    check_size("W_in", W_in.shape[1], 2 * inner, "2 inner, as in filters")
    check_size("W_out", W_out.shape[0], inner, "inner, as in filters")
    u = x @ W_in
    padded = np.concatenate(
        [np.zeros_like(u, shape=(*u.shape[:-2], max(taps - 1, 0), inner)), u[..., :inner]], axis=-2
    )
    mixed = np.zeros_like(u[..., :inner])
    for tap in range(taps):
        mixed = mixed + filters[:, tap] * padded[..., tap : tap + x.shape[-2], :]
    return (silu(mixed) * u[..., inner:]) @ W_out


def layer_kinds(n_layers: int) -> tuple[str, ...]:
    """S12: "linear", "window" or "convolution" for each layer of a released model.

    >>> layer_kinds(27)[:4]
    ('convolution', 'linear', 'window', 'convolution')
    """
    check_choice("n_layers", n_layers, tuple(PATTERNS))
    linear, window = PATTERNS[n_layers]
    kinds = dict.fromkeys(linear, "linear") | dict.fromkeys(window, "window")
    return tuple(kinds.get(layer, "convolution") for layer in range(n_layers))
