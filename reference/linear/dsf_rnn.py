"""Recurrent mixers of `dsf`: qLSTM and RG-LRU. Clauses S10 to S12 and S16 are those of `dsf`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_bool, check_shaped, check_size
from attnspec.reference.linear.dsf_recurrence import (
    check_given,
    check_number,
    elementwise_scan,
    elementwise_scan_backward,
    sigmoid_power,
    softplus,
)
from attnspec.reference.primitives.gelu import gelu

LayerState = tuple[np.ndarray, np.ndarray]


def qlstm(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    alpha: float = 1.0,
    reversed: bool = False,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S11: y (..., T, N) and the last h (..., N), of pre-activations f, i, o and inputs z (..., T,
    N); h0 (..., N) or None. `alpha` is only used by the reversed gate.

    >>> zero = np.zeros((2, 1))
    >>> y, h = qlstm(zero, zero, zero, 4 + zero)
    >>> y.ravel(), h
    (array([1. , 1.5]), array([3.]))
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    states, last = elementwise_scan(
        forget_gate(f, alpha, reversed), sigmoid_power(i) * z, check_given("h0", h0, _last(z))
    )
    return sigmoid_power(o) * states, last


def qlstm_backward(
    f: np.ndarray,
    i: np.ndarray,
    o: np.ndarray,
    z: np.ndarray,
    h0: np.ndarray | None,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    alpha: float = 1.0,
    reversed: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: df, di, do, dz, dh0 of `qlstm`; dh0 is None without an h0.

    dy (..., T, N) and dh (..., N), or None, are the gradients of its outputs.

    >>> zero = np.zeros((1, 1))
    >>> start, one = zero[0], 1 + zero
    >>> [float(g.squeeze()) for g in qlstm_backward(zero, zero, zero, 8 * one, start, one)]
    [0.0, 1.0, 1.0, 0.25, 0.25]
    >>> [float(g.squeeze()) for g in qlstm_backward(zero, zero, zero, 8 * one, start, one, one[0])]
    [0.0, 3.0, 1.0, 0.75, 0.75]
    """
    check_gates(f, i, o, alpha, reversed)
    check_shaped("z", z, f.shape)
    check_shaped("dy", dy, z.shape)
    dh = check_given("dh", dh, _last(z))
    a, enter, read = forget_gate(f, alpha, reversed), sigmoid_power(i), sigmoid_power(o)
    first = check_given("h0", h0, _last(z))
    states, _ = elementwise_scan(a, enter * z, first)
    da, dx, dh0 = elementwise_scan_backward(a, enter * z, first, read * dy, dh)
    slope = -max(alpha, 0.0) * sigmoid_power(f) if reversed else sigmoid_power(-f)
    return (
        da * a * slope,
        dx * z * enter * sigmoid_power(-i),
        dy * states * read * sigmoid_power(-o),
        dx * enter,
        dh0,
    )


def forget_gate(f: np.ndarray, alpha: float = 1.0, reversed: bool = False) -> np.ndarray:
    """S10, S11: a of pre-activations f.

    >>> forget_gate(np.zeros(1)), forget_gate(np.zeros(1), 2.0, True)
    (array([0.5]), array([0.25]))
    """
    return sigmoid_power(-f, max(alpha, 0.0)) if reversed else sigmoid_power(f)


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
    both = x @ input_weight.T
    gate, branch = both[..., :hidden], both[..., hidden:]
    seen = np.concatenate([rows, branch], axis=-2)
    z = causal_convolution(seen, conv_weight, conv_bias)
    gates = z @ gates_weight.T + gates_bias
    f, i, o = (gates[..., n * hidden : (n + 1) * hidden] for n in range(3))
    y, h = qlstm(f, i, o, z, alpha, reversed, h0)
    return (gelu(gate) * y) @ output_weight.T, (h, seen[..., seen.shape[-2] - width + 1 :, :])


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


def rg_lru(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S12: y (..., T, N) and the last h (..., N).

    u, r, g (..., T, N): inputs, pre-activations of the decay and of the input gate; lam (N,), h0
    (..., N) or None.

    >>> zero = np.zeros((2, 1))
    >>> y, h = rg_lru(2 + zero, zero, zero, np.full(1, 50.0))
    >>> np.round(y, 3).ravel()
    array([1., 1.])
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    return elementwise_scan(np.exp(log_decay), strength * u, check_given("h0", h0, _last(u)))


def rg_lru_gates(
    r: np.ndarray, g: np.ndarray, lam: np.ndarray, c: float
) -> tuple[np.ndarray, np.ndarray]:
    """S12: the log of Lambda and the diagonal of B (..., T, N).

    >>> w, strength = rg_lru_gates(np.zeros(1), np.zeros(1), np.full(1, 50.0), 8.0)
    >>> w, strength
    (array([-200.]), array([0.5]))
    """
    log_decay = -c * softplus(lam) * sigmoid_power(r)
    return log_decay, np.sqrt(-np.expm1(2 * log_decay)) * sigmoid_power(g)


def rg_lru_backward(
    u: np.ndarray,
    r: np.ndarray,
    g: np.ndarray,
    lam: np.ndarray,
    dy: np.ndarray,
    dh: np.ndarray | None = None,
    *,
    c: float = 8.0,
    h0: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """S16: du, dr, dg, dlam, dh0 of `rg_lru`; dh0 is None without an h0.

    dy (..., T, N) and dh (..., N), or None, are the gradients of its outputs. A root of 0 counts as
    a constant (ours).

    >>> zero = np.zeros((1, 1))
    >>> [float(np.round(x, 3).squeeze()) for x in rg_lru_backward(
    ...     2 + zero, zero, zero, np.full(1, 50.0), 1 + zero, 2 + zero[0], h0=zero[0])]
    [1.5, 0.0, 1.5, 0.0, 0.0]
    """
    check_array("u", u, ("T", "N"))
    check_rg_lru(r, g, lam, c, u)
    check_shaped("dy", dy, u.shape)
    first, dh = check_given("h0", h0, _last(u)), check_given("dh", dh, _last(u))
    log_decay, strength = rg_lru_gates(r, g, lam, c)
    decay = np.exp(log_decay)
    da, dx, dh0 = elementwise_scan_backward(decay, strength * u, first, dy, dh)
    lost = -np.expm1(2 * log_decay)
    forgets = lost > 0
    droot = dx * u * sigmoid_power(g) / np.sqrt(np.where(forgets, lost, np.ones_like(lost)))
    dlog = decay * (da - np.where(forgets, droot * decay, np.zeros_like(droot)))
    dr = dlog * log_decay * sigmoid_power(-r)
    dlam = -c * dlog * sigmoid_power(r) * sigmoid_power(lam)
    return (
        dx * strength,
        dr,
        dx * u * strength * sigmoid_power(-g),
        np.sum(dlam, axis=tuple(range(u.ndim - 1))),
        dh0,
    )


def _last(x: np.ndarray) -> tuple[int, ...]:
    return *x.shape[:-2], x.shape[-1]


def check_gates(f: Any, i: Any, o: Any, alpha: Any, reversed: Any) -> None:
    """S11, K14: gates have one shape.

    >>> check_gates(*np.ones((3, 2, 1)), 1.0, 1)
    Traceback (most recent call last):
    TypeError: reversed: got 1, expected True or False
    """
    check_array("f", f, ("T", "N"))
    for name, x in (("i", i), ("o", o)):
        check_shaped(name, x, f.shape)
    check_number("alpha", alpha)
    check_bool("reversed", reversed)


def check_rg_lru(r: Any, g: Any, lam: Any, c: Any, like: np.ndarray) -> None:
    """S12, K14: gates and rates fit the input.

    >>> check_rg_lru(*np.ones((2, 2, 1)), np.ones(1), 0, np.ones((2, 1)))
    Traceback (most recent call last):
    ValueError: c: got 0, expected a number > 0
    """
    for name, x in (("r", r), ("g", g)):
        check_shaped(name, x, like.shape)
    check_shaped("lam", lam, like.shape[-1:])
    check_number("c", c)
    if not c > 0:
        raise ValueError(f"c: got {c}, expected a number > 0")


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
