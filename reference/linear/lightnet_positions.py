r"""LightNet's position encodings: MD-LRPE on queries and keys, MD-TPE behind the embedding.

Definition
----------
S12. **Angles.** Tokens form a grid (n_1, .., n_r), row by row, behind l tokens without a position.
With theta (heads, c), c = ceil(w / r) for w angles: a token at (p_1, .., p_r), p from 0, has
:math:`p_1 \theta, p_2 \theta, \ldots` one behind the other, cut to w, so that the last axis may
get fewer. The l tokens have angle 0.

S13. **MD-LRPE.** The cosine form has w = d and turns x into :math:`[x \cos a, x \sin a]`, of width
2 d; the product of two such rows is :math:`\sum_c q_c k_c \cos(a_c - b_c)`. The rotary form has w =
d / 2 and rotates the pairs :math:`(x_c, x_{c + d/2})`. Both depend on differences of coordinates
alone. q is encoded behind its activation and :math:`\bar k` behind its gates; in the cosine form
the decay vector is then repeated for both halves.

S14. **TPE.** A Toeplitz filter that is a decaying exponential, one a head: :math:`y_t = (q_p \cdot
k_p) \sum_{s \le t} \lambda^{t-s} x_s`. The state is :math:`k_p \sum_s \lambda^{t-s} x_s^T`.

S15. **MD-TPE.** One TPE along every listed axis of the grid, applied to the same x; their sum. Each
runs one way along its axis, from the first token to the last.

A learned theta that starts at :math:`10000^{-2c/d}`, and one decay a head in S14, a sigmoid of its
parameter, are the first author's later code. The paper has a sum of exponentials, :math:`\sum_j a_j
b_j \lambda_j^{t-s}`; how it parametrises them is unverified. A norm and a linear map follow S14 and
S15 in that code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_choice, check_integer, check_size

Parameters = tuple[np.ndarray, np.ndarray, np.ndarray]
LRPE_TYPES = ("cosine", "rotary")


def md_angles(shape: Sequence[int], theta: np.ndarray, d: int, l: int = 0) -> np.ndarray:
    """S12: angles (heads, l + prod(shape), d) of theta (heads, ceil(d / len(shape))).

    >>> md_angles((2, 2), np.array([[1.0]]), 2, 1)[0]
    array([[0., 0.],
           [0., 0.],
           [0., 1.],
           [1., 0.],
           [1., 1.]])
    """
    shape = check_grid(shape)
    check_integer("d", d, least=1)
    check_integer("l", l, least=0)
    check_array("theta", theta, ("heads", "c"))
    if theta.ndim != 2 or theta.shape[1] != -(-d // len(shape)):
        expected = f"(heads, {-(-d // len(shape))})"
        raise ValueError(f"theta: got shape {theta.shape}, expected {expected}")
    places = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, len(shape)).astype(theta.dtype)
    angles = places[None, :, :, None] * theta[:, None, None, :]
    angles = angles.reshape(theta.shape[0], len(places), -1)[..., :d]
    return np.concatenate([np.zeros_like(angles, shape=(len(theta), l, d)), angles], axis=1)


def md_lrpe(
    x: np.ndarray,
    theta: np.ndarray,
    shape: Sequence[int],
    l: int = 0,
    *,
    lrpe_type: str = "cosine",
) -> np.ndarray:
    """S12, S13: x (..., heads, l + prod(shape), d), encoded; twice as wide in the cosine form.

    theta (heads, ceil(d / len(shape))), or of half that d in the rotary form, whose d is even.

    >>> md_lrpe(np.array([[[3.0], [2.0]]]), np.array([[np.pi / 2]]), (2,)).round(3) + 0.0
    array([[[3., 0.],
            [0., 2.]]])
    """
    check_array("x", x, ("heads", "tokens", "d"))
    check_choice("lrpe_type", lrpe_type, LRPE_TYPES)
    d = x.shape[-1]
    if lrpe_type == "rotary" and d % 2:
        raise ValueError(f"x: got {d} channels, expected an even number (lrpe_type 'rotary')")
    angles = md_angles(shape, theta, d if lrpe_type == "cosine" else d // 2, l)
    check_size("theta", theta.shape[0], x.shape[-3], "heads, as in x")
    check_size("x", x.shape[-2], angles.shape[-2], "tokens, as shape and l say")
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    if lrpe_type == "cosine":
        return np.concatenate([x * cos, x * sin], axis=-1)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def tpe(
    x: np.ndarray,
    qp: np.ndarray,
    kp: np.ndarray,
    lam: np.ndarray,
    state: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S14: y, shaped as x (..., heads, T, d_h), and the state (..., heads, m, d_h).

    qp and kp (heads, m), lam (heads,), above 0 and at most 1.

    >>> x = np.array([[[1.0], [0.0], [0.0]]])
    >>> y, state = tpe(x, np.array([[3.0]]), np.array([[2.0]]), np.array([0.5]))
    >>> y.ravel(), state.ravel()
    (array([6. , 3. , 1.5]), array([0.5]))
    """
    check_array("x", x, ("heads", "T", "d_h"))
    check_filter(qp, kp, lam, x.shape[-3])
    shape = (*x.shape[:-2], qp.shape[-1], x.shape[-1])
    if state is None:
        state = np.zeros_like(x, shape=shape)
    check_array("state", state, ("heads", "m", "d_h"))
    if state.shape != shape:
        raise ValueError(f"state: got shape {state.shape}, expected {shape}")
    y = np.zeros_like(x)
    for t in range(x.shape[-2]):
        state = lam[:, None, None] * state + kp[:, :, None] * x[..., t, None, :]
        y[..., t, :] = np.einsum("hm,...hme->...he", qp, state)
    return y, state


def md_tpe(x: np.ndarray, params: Sequence[Parameters], axes: Sequence[int]) -> np.ndarray:
    """S15: shaped as x (batch, n_1, .., n_r, heads * d_h), filtered along `axes` of n_1 .. n_r.

    params[i] = (qp, kp, lam) of axes[i], as in `tpe`.

    >>> one = (np.ones((1, 1)), np.ones((1, 1)), np.ones(1))
    >>> md_tpe(np.ones((1, 2, 2, 1)), [one, one], [0, 1])[0, ..., 0]
    array([[2., 3.],
           [3., 4.]])
    """
    check_grid_filters(x, params, axes)
    y = np.zeros_like(x)
    for (qp, kp, lam), axis in zip(params, axes, strict=True):
        y = y + join_heads(tpe(split_heads(x, axis, qp.shape[0]), qp, kp, lam)[0], axis)
    return y


def split_heads(x: np.ndarray, axis: int, heads: int) -> np.ndarray:
    """S15: x (batch, n_1, .., width) with the tokens of one axis as (..., heads, n, d_h).

    >>> split_heads(np.ones((1, 5, 6)), 0, 2).shape
    (1, 2, 5, 3)
    """
    rows = np.moveaxis(x, 1 + axis, -2)
    return np.moveaxis(rows.reshape(*rows.shape[:-1], heads, -1), -2, -3)


def join_heads(x: np.ndarray, axis: int) -> np.ndarray:
    """S15: undo `split_heads`.

    >>> join_heads(np.ones((1, 2, 5, 3)), 0).shape
    (1, 5, 6)
    """
    rows = np.moveaxis(x, -3, -2)
    return np.moveaxis(rows.reshape(*rows.shape[:-2], -1), -2, 1 + axis)


def check_grid(shape: Any) -> tuple[int, ...]:
    """K14: at least one axis, each of at least one token.

    >>> check_grid((2, 0))
    Traceback (most recent call last):
    ValueError: shape: got (2, 0), expected positive integers
    """
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"shape: got {type(shape).__name__}, expected a tuple of integers")
    if not shape or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in shape):
        raise ValueError(f"shape: got {tuple(shape)}, expected positive integers")
    return tuple(int(n) for n in shape)


def check_filter(qp: Any, kp: Any, lam: Any, heads: int) -> None:
    """K14: parameters of one TPE.

    >>> check_filter(np.ones((1, 1)), np.ones((1, 1)), np.zeros(1), 1)
    Traceback (most recent call last):
    ValueError: lam: got a value outside (0, 1], expected decays
    """
    for name, x, dims in (("qp", qp, 2), ("kp", kp, 2), ("lam", lam, 1)):
        check_array(name, x, ("heads",))
        if x.ndim != dims:
            expected = "(heads, m)" if dims == 2 else "(heads,)"
            raise ValueError(f"{name}: got shape {x.shape}, expected {expected}")
        check_size(name, x.shape[0], heads, "heads, as in x")
    check_size("kp", kp.shape[1], qp.shape[1], "m, as in qp")
    if not np.all((lam > 0) & (lam <= 1)):
        raise ValueError("lam: got a value outside (0, 1], expected decays")


def check_grid_filters(x: Any, params: Any, axes: Any) -> None:
    """K14: as many parameters as axes, all of which the grid has, and heads that divide the width.

    >>> check_grid_filters(np.ones((1, 2, 1)), [], [])
    Traceback (most recent call last):
    ValueError: axes: got (), expected at least one axis
    """
    check_array("x", x, ("batch", "n_1", "width"))
    for name, value in (("params", params), ("axes", axes)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a tuple or list")
    if not axes:
        raise ValueError("axes: got (), expected at least one axis")
    check_size("params", len(params), len(axes), "one for each of axes")
    for axis in axes:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise TypeError(f"axes: got {axis!r}, expected integers")
        if not 0 <= axis < x.ndim - 2:
            raise ValueError(f"axes: got {axis}, expected an axis below {x.ndim - 2}")
    for one in params:
        if not isinstance(one, (tuple, list)) or len(one) != 3:
            raise TypeError(f"params: got {type(one).__name__}, expected (qp, kp, lam)")
        check_array("params", one[0], ("heads", "m"))
        if x.shape[-1] % max(one[0].shape[0], 1) or math.prod(one[0].shape) == 0:
            raise ValueError(
                f"params: got {one[0].shape[0]} heads, expected a divisor of {x.shape[-1]}"
            )
