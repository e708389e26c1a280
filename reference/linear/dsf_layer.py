"""The qLSTM layer of `dsf`: projections and a convolution around its gated recurrence. Clauses S11
and S16 are those of `dsf`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped, check_size
from attnspec.reference.linear.dsf_recurrence import check_given
from attnspec.reference.linear.dsf_rnn import qlstm, qlstm_backward
from attnspec.reference.primitives.gelu import gelu, gelu_slope

LayerState = tuple[np.ndarray, np.ndarray]


def qlstm_layer(
    x: np.ndarray,
    input_weight: np.ndarray,
    conv_weight: np.ndarray,
    conv_bias: np.ndarray,
    gates_weight: np.ndarray,
    gates_bias: np.ndarray,
    output_weight: np.ndarray,
    alpha: float = 1.0,
    reversed: bool = False,
    state: LayerState | None = None,
) -> tuple[np.ndarray, LayerState]:
    """S11: (..., T, d_model) and the state: h (..., hidden), branch rows (..., width - 1, hidden).

    x (..., T, d_model), input_weight (2 hidden, d_model), conv_weight (hidden, width), conv_bias
    (hidden,), gates_weight (3 hidden, hidden), gates_bias (3 hidden,), output_weight (d_model,
    hidden). The paper has hidden = 2 d_model and width = 4.

    >>> one = np.ones((1, 1))
    >>> out, (h, rows) = qlstm_layer(
    ...     one, np.array([[20.0], [1.0]]), np.array([[0.0, 2.0]]), np.zeros(1), np.zeros((3, 1)),
    ...     np.zeros(3), one)
    >>> out, h, rows
    (array([[10.]]), array([1.]), array([[1.]]))
    """
    check_layer(x, input_weight, conv_weight, conv_bias, gates_weight, gates_bias, output_weight)
    hidden, width = conv_weight.shape
    h0, rows = check_layer_state(state, x, hidden, width)
    gate, seen = _projected(x, input_weight, rows)
    z = causal_convolution(seen, conv_weight, conv_bias)
    f, i, o = _thirds(z @ gates_weight.T + gates_bias)
    y, h = qlstm(f, i, o, z, alpha, reversed, h0)
    return (gelu(gate) * y) @ output_weight.T, (h, seen[..., x.shape[-2] :, :])


def qlstm_layer_backward(
    x: np.ndarray,
    input_weight: np.ndarray,
    conv_weight: np.ndarray,
    conv_bias: np.ndarray,
    gates_weight: np.ndarray,
    gates_bias: np.ndarray,
    output_weight: np.ndarray,
    state: LayerState | None,
    dout: np.ndarray,
    dh: np.ndarray | None = None,
    drows: np.ndarray | None = None,
    *,
    alpha: float = 1.0,
    reversed: bool = False,
) -> tuple[Any, ...]:
    """S16: the gradients of x, the six weights, alpha and the state, None without one, of
    `qlstm_layer`; those of the weights are summed over all tokens.

    dout (..., T, d_model), dh (..., hidden) and drows (..., width - 1, hidden), of which the last
    two may be None, are the gradients of its outputs.

    >>> one = np.ones((1, 1))
    >>> made = qlstm_layer_backward(
    ...     one, np.array([[20.0], [1.0]]), np.array([[0.0, 2.0]]), np.zeros(1), np.zeros((3, 1)),
    ...     np.zeros(3), one, None, one, drows=3 * one)
    >>> [float(g.squeeze()) for g in (made[0], made[3], made[6])]
    [23.0, 5.0, 10.0]
    """
    check_layer(x, input_weight, conv_weight, conv_bias, gates_weight, gates_bias, output_weight)
    check_shaped("dout", dout, x.shape)
    hidden, width = conv_weight.shape
    h0, rows = check_layer_state(state, x, hidden, width)
    drows = check_given("drows", drows, rows.shape)
    gate, seen = _projected(x, input_weight, rows)
    z = causal_convolution(seen, conv_weight, conv_bias)
    f, i, o = _thirds(z @ gates_weight.T + gates_bias)
    y, _ = qlstm(f, i, o, z, alpha, reversed, h0)

    through = dout @ output_weight
    df, di, do, dz, dalpha, dh0 = qlstm_backward(
        f, i, o, z, h0, through * gelu(gate), dh, alpha=alpha, reversed=reversed
    )
    dgates = np.concatenate([df, di, do], axis=-1)
    dz = dz + dgates @ gates_weight
    dseen, dconv = _convolution_backward(seen, conv_weight, dz)
    if drows is not None:
        dseen[..., x.shape[-2] :, :] += drows
    dboth = np.concatenate([through * y * gelu_slope(gate), dseen[..., width - 1 :, :]], axis=-1)
    return (
        dboth @ input_weight,
        _over_tokens(dboth, x),
        dconv,
        _total(dz),
        _over_tokens(dgates, z),
        _total(dgates),
        _over_tokens(dout, gelu(gate) * y),
        dalpha,
        None if state is None else (dh0, dseen[..., : width - 1, :]),
    )


def causal_convolution(seen: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """S11: (..., T, hidden) of rows (..., width - 1 + T, hidden), weight (hidden, width).

    >>> causal_convolution(np.array([[0.0], [1.0], [2.0]]), np.array([[10.0, 1.0]]), np.zeros(1))
    array([[ 1.],
           [12.]])
    """
    width = weight.shape[-1]
    T = seen.shape[-2] - width + 1
    windows = np.stack([seen[..., n : n + T, :] for n in range(width)], axis=-1)
    return np.einsum("...cw,cw->...c", windows, weight) + bias


def _projected(
    x: np.ndarray, input_weight: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """gate (..., T, hidden), and the rows of branch with those before them."""
    both = x @ input_weight.T
    hidden = rows.shape[-1]
    return both[..., :hidden], np.concatenate([rows, both[..., hidden:]], axis=-2)


def _thirds(gates: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    hidden = gates.shape[-1] // 3
    return gates[..., :hidden], gates[..., hidden : 2 * hidden], gates[..., 2 * hidden :]


def _convolution_backward(
    seen: np.ndarray, weight: np.ndarray, dz: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of `causal_convolution` in its rows and its weight."""
    T, width = dz.shape[-2], weight.shape[-1]
    dseen = np.zeros_like(seen)
    slopes = []
    for n in range(width):
        dseen[..., n : n + T, :] += dz * weight[:, n]
        slopes.append(_total(dz * seen[..., n : n + T, :]))
    return dseen, np.stack(slopes, axis=-1)


def _total(x: np.ndarray) -> np.ndarray:
    """The sum over all tokens, of a channel each."""
    return np.asanyarray(np.sum(x, axis=tuple(range(x.ndim - 1))))


def _over_tokens(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """dy^T x, the gradient of a matrix, summed over leading axes too."""
    product = np.swapaxes(dy, -1, -2) @ x
    return np.asanyarray(np.sum(product, axis=tuple(range(product.ndim - 2))))


def check_layer(x: Any, wi: Any, wc: Any, bc: Any, wg: Any, bg: Any, wo: Any) -> None:
    """S11, K14: the weights of a layer fit one another.

    >>> check_layer(*np.ones((7, 1, 1)))
    Traceback (most recent call last):
    ValueError: input_weight: got shape (1, 1), expected (2, 1)
    """
    check_array("x", x, ("T", "d_model"))
    check_array("conv_weight", wc, ("hidden", "width"))
    check_size("conv_weight", wc.ndim, 2, "axes")
    if wc.shape[1] < 1:
        raise ValueError(f"conv_weight: got shape {wc.shape}, expected a width >= 1")
    d_model, hidden = x.shape[-1], wc.shape[0]
    for name, w, shape in (
        ("input_weight", wi, (2 * hidden, d_model)),
        ("conv_bias", bc, (hidden,)),
        ("gates_weight", wg, (3 * hidden, hidden)),
        ("gates_bias", bg, (3 * hidden,)),
        ("output_weight", wo, (d_model, hidden)),
    ):
        check_shaped(name, w, shape)


def check_layer_state(state: Any, x: np.ndarray, hidden: int, width: int) -> LayerState:
    """S11, K14: h and the last rows of branch, or zeros.

    >>> check_layer_state(0, np.ones((1, 1)), 1, 4)
    Traceback (most recent call last):
    TypeError: state: got int, expected (h, rows)
    """
    shapes = (*x.shape[:-2], hidden), (*x.shape[:-2], width - 1, hidden)
    if state is None:
        return np.zeros_like(x, shape=shapes[0]), np.zeros_like(x, shape=shapes[1])
    if not isinstance(state, tuple) or len(state) != 2:
        raise TypeError(f"state: got {type(state).__name__}, expected (h, rows)")
    for part, shape in zip(state, shapes, strict=True):
        check_shaped("state", part, shape)
    return state
