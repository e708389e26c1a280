"""The memory of Titans: a matrix or a small MLP, read by its forward pass, taught by its gradient.

The clauses S1 and S2 of `titans`. Weights are a tuple of matrices, one for each layer, so that a
linear memory is a tuple of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_size
from attnspec.reference.primitives.gelu import gelu, gelu_slope


def mlp_memory(W: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
    """S1: M(x) (..., T, dv) for rows x (..., T, d) and layers W (..., d, h), ..., (..., h, dv).

    >>> mlp_memory((np.eye(2), np.ones((2, 1))), np.array([[1.0, 0.0]])).round(4)
    array([[0.8413]])
    """
    check_array("x", x, ("T", "d"))
    check_layers("W", W, x, "x")
    return hidden_rows(W, x)[1][-1]


def memory_grad(
    W: Sequence[np.ndarray], k: np.ndarray, v: np.ndarray, loss_scale: float = 2.0
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """S2: the rank-one gradients of the tokens in factors, H and Delta, one pair for each layer.

    k (..., T, d), v (..., T, dv); the gradient of token t in layer l is the outer product of
    H[l][..., t, :] (that layer's input) and Delta[l][..., t, :].

    >>> H, Delta = memory_grad((np.zeros((1, 1)),), np.array([[3.0]]), np.array([[5.0]]))
    >>> H[0], Delta[0]
    (array([[3.]]), array([[-10.]]))
    """
    check_array("k", k, ("T", "d"))
    check_array("v", v, ("T", "dv"))
    check_layers("W", W, k, "k")
    check_scale(loss_scale)
    _check_like("v", v, k, "k")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: got shape {v.shape}, expected {(*k.shape[:-1], 'dv')}, as k")
    check_size("v", v.shape[-1], W[-1].shape[-1], "dv, the width of the last layer")
    H, z = hidden_rows(W, k)
    return H, output_gradients(W, z, v, loss_scale)


def hidden_rows(
    W: Sequence[np.ndarray], x: np.ndarray
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """S1: the inputs h and the products z of all layers.

    >>> [rows[0] for rows in hidden_rows((np.ones((1, 1)),), np.array([[2.0]]))]
    [array([[2.]]), array([[2.]])]
    """
    inputs, products = [x], [x @ W[0]]
    for weights in W[1:]:
        inputs.append(gelu(products[-1]))
        products.append(inputs[-1] @ weights)
    return tuple(inputs), tuple(products)


def output_gradients(
    W: Sequence[np.ndarray], z: Sequence[np.ndarray], v: np.ndarray, loss_scale: float
) -> tuple[np.ndarray, ...]:
    """S2: the gradients delta of the products z of all layers.

    >>> output_gradients((np.ones((1, 1)),), (np.ones((1, 1)),), np.zeros((1, 1)), 2.0)
    (array([[2.]]),)
    """
    deltas = [loss_scale * (z[-1] - v)]
    for layer in reversed(range(len(W) - 1)):
        back = deltas[0] @ np.swapaxes(W[layer + 1], -1, -2)
        deltas.insert(0, back * gelu_slope(z[layer]))
    return tuple(deltas)


def check_layers(name: str, W: Any, x: np.ndarray, of: str) -> None:
    """S1, K14: `W` holds layers that fit one another and the rows `x`, argument `of`.

    >>> check_layers("W", (np.zeros((3, 1)),), np.zeros((1, 2)), "k")
    Traceback (most recent call last):
    ValueError: W: got 3, expected 2 (inputs of layer 1, d of k)
    """
    if not isinstance(W, (tuple, list)):
        raise TypeError(f"{name}: got {type(W).__name__}, expected a tuple of numpy.ndarray")
    if not W:
        raise ValueError(f"{name}: got no layer, expected one or more")
    width, what = x.shape[-1], f"d of {of}"
    for layer, weights in enumerate(W, 1):
        check_array(name, weights, ("inputs", "outputs"))
        check_size(name, weights.shape[-2], width, f"inputs of layer {layer}, {what}")
        _check_like(name, weights, x, of)
        if weights.shape[:-2] not in ((), x.shape[:-2]):
            raise ValueError(f"{name}: got leading axes {weights.shape[:-2]}, expected none or "
                             f"{x.shape[:-2]}, as {of}")  # fmt: skip
        width, what = weights.shape[-1], f"outputs of layer {layer}"


def check_scale(loss_scale: Any) -> None:
    """S2, K14: a finite number > 0.

    >>> check_scale(0)
    Traceback (most recent call last):
    ValueError: loss_scale: got 0, expected a finite number > 0
    """
    number = isinstance(loss_scale, (int, float, np.floating, np.integer))
    if not number or isinstance(loss_scale, bool):
        raise TypeError(f"loss_scale: got {loss_scale!r}, expected a finite number > 0")
    if not (math.isfinite(loss_scale) and loss_scale > 0):
        raise ValueError(f"loss_scale: got {loss_scale}, expected a finite number > 0")


def _check_like(name: str, x: np.ndarray, other: np.ndarray, of: str) -> None:
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: got dtype {x.dtype}, expected {other.dtype}, as {of}")
