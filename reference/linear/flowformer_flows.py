"""Flowformer's flows: features, flows, conserved flows, competition and allocation, both orders.

Sums run over tokens of one head; everything is elementwise or a sum, in the dtype given.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_choice, check_size
from attnspec.reference.primitives.sigmoid import sigmoid

KINDS = ("sigmoid", "relu")
Clamp = tuple[float, float] | None


def flow_features(x: np.ndarray, kind: str = "sigmoid") -> np.ndarray:
    """S1: phi(x) (..., d) elementwise: sigmoid(x), or relu(x) + 1e-6.

    >>> flow_features(np.array([0.0, -3.0]), "relu"), flow_features(np.zeros(1))
    (array([1.e-06, 1.e-06]), array([0.5]))
    """
    check_array("x", x, ("d",))
    check_choice("kind", kind, KINDS)
    if kind == "relu":
        return np.maximum(x, np.zeros_like(x)) + 1e-6
    return sigmoid(x)


def features_slope(x: np.ndarray, kind: str) -> np.ndarray:
    """S13: the derivative of `flow_features`.

    >>> features_slope(np.zeros(1), "sigmoid"), features_slope(np.array([2.0]), "relu")
    (array([0.25]), array([1.]))
    """
    if kind == "relu":
        return np.where(x > 0, np.ones_like(x), np.zeros_like(x))
    a = sigmoid(x)
    return a * sigmoid(-x)


def flows(a: np.ndarray, b: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """S2: incoming flow I (..., heads, n) of sinks a (..., heads, n, d) and outgoing flow O
    (..., heads, m) of sources b (..., heads, m, d).

    >>> flows(np.ones((1, 2, 3)), np.ones((1, 4, 3)), eps=0.0)
    (array([[12., 12.]]), array([[6., 6., 6., 6.]]))
    """
    check_pair(a, b, eps)
    into = np.sum(b, axis=-2, keepdims=True)
    out_of = np.sum(a, axis=-2, keepdims=True)
    return dot(a + eps, into + eps), dot(b + eps, out_of + eps)


def conserved_flows(
    a: np.ndarray,
    b: np.ndarray,
    I: np.ndarray,
    O: np.ndarray,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S3: Ih (..., heads, n) and Oh (..., heads, m) when each source, each sink has the flow 1.

    >>> a, b = np.ones((1, 2, 3)), np.ones((1, 4, 3))
    >>> conserved_flows(a, b, *flows(a, b, 0.0), 0.0)
    (array([[2., 2.]]), array([[0.5, 0.5, 0.5, 0.5]]))
    """
    check_pair(a, b, eps)
    check_flow("I", I, a)
    check_flow("O", O, b)
    into = np.sum(quotient(b, O), axis=-2, keepdims=True)
    out_of = np.sum(quotient(a, I), axis=-2, keepdims=True)
    return dot(a + eps, into + eps), dot(b + eps, out_of + eps)


def competition(
    Oh: np.ndarray, clamp: Clamp = (-1.0, 1.0), mask: np.ndarray | None = None
) -> np.ndarray:
    """S4: c (..., heads, m), m times the softmax of the clamped Oh over the sources.

    `mask` bool (..., m), without heads, True = a source that counts.

    >>> competition(np.array([[0.5, 0.5]]))
    array([[1., 1.]])
    """
    check_array("Oh", Oh, ("heads", "sources"))
    clamped = clip(Oh, clamp)
    real = np.ones(Oh.shape, bool)
    if mask is not None:
        check_mask("mask", mask, (*Oh.shape[:-2], Oh.shape[-1]))
        real = np.broadcast_to(mask[..., None, :], Oh.shape)
    top = np.max(np.where(real, clamped, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, np.zeros_like(top))
    weights = np.where(real, np.exp(np.where(real, clamped, top) - top), np.zeros_like(Oh))
    total = np.sum(weights, axis=-1, keepdims=True)
    count = np.sum(real, axis=-1, keepdims=True).astype(Oh.dtype)
    return count * weights / np.where(total == 0, np.ones_like(total), total)


def allocation(Ih: np.ndarray, n: Any, m: Any) -> np.ndarray:
    """S5: g = sigmoid(Ih n / m); n and m are numbers of tokens, or one for each batch entry.

    >>> allocation(np.zeros((1, 2)), 2, 4)
    array([[0.5, 0.5]])
    """
    check_array("Ih", Ih, ("heads", "sinks"))
    return sigmoid(Ih * share(n, m, Ih))


def share(n: Any, m: Any, Ih: np.ndarray) -> np.ndarray:
    """S5, K14: n / m in the dtype of Ih (..., heads, sinks), to be multiplied with it.

    >>> share(2, 4, np.zeros((1, 2)))
    array([[0.5]])
    """
    counts = []
    for name, count in (("n", n), ("m", m)):
        number = np.asarray(count)
        if number.dtype.kind not in "iu" or number.ndim > max(Ih.ndim - 2, 0):
            raise TypeError(f"{name}: got {count!r}, expected a number of tokens")
        if np.any(number < 0):
            raise ValueError(f"{name}: got {count!r}, expected numbers >= 0")
        counts.append((np.zeros_like(Ih, shape=()) + number)[..., None, None].astype(Ih.dtype))
    return counts[0] / np.maximum(counts[1], np.ones_like(counts[1]))


def flows_causal(a: np.ndarray, b: np.ndarray, eps: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """S7: I and O (..., heads, T), each token's sums ending with its own.

    >>> flows_causal(np.ones((1, 2, 3)), np.ones((1, 2, 3)), eps=0.0)[0]
    array([[3., 6.]])
    """
    check_pair(a, b, eps, causal=True)
    into, out_of = np.cumsum(b, axis=-2), np.cumsum(a, axis=-2)
    return dot(a + eps, into + eps), dot(b + eps, out_of + eps)


def conserved_flows_causal(
    a: np.ndarray,
    b: np.ndarray,
    I: np.ndarray,
    O: np.ndarray,
    eps: float = 1e-6,
) -> tuple[np.ndarray, np.ndarray]:
    """S8: Ih and Oh (..., heads, T), sums of N / O and N / I up to each token, divided by its N.

    >>> a = np.ones((1, 2, 3))
    >>> conserved_flows_causal(a, a, *flows_causal(a, a, 0.0), 0.0)[0]
    array([[1., 1.]])
    """
    check_pair(a, b, eps, causal=True)
    check_flow("I", I, a)
    check_flow("O", O, b)
    N = np.cumsum(np.ones_like(I), axis=-1)
    into = np.cumsum(quotient(b, O / N), axis=-2)
    out_of = np.cumsum(quotient(a, I / N), axis=-2)
    return dot(a + eps, into + eps) / N, dot(b + eps, out_of + eps) / N


def competition_causal(Oh: np.ndarray, clamp: Clamp = (-1.0, 1.0)) -> np.ndarray:
    """S10: c_t = N_t exp(Oh_t) / sum of exp(Oh) up to t, (..., heads, T), Oh being clamped.

    >>> competition_causal(np.array([[0.5, 0.5]]))
    array([[1., 1.]])
    """
    check_array("Oh", Oh, ("heads", "T"))
    x = clip(Oh, clamp)
    N = np.cumsum(np.ones_like(x), axis=-1)
    top = np.maximum.accumulate(x, axis=-1)
    c = np.zeros_like(x)
    for t in range(x.shape[-1]):
        total = np.sum(np.exp(x[..., : t + 1] - top[..., t : t + 1]), axis=-1)
        c[..., t] = N[..., t] * np.exp(x[..., t] - top[..., t]) / total
    return c


def dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """S2: the sum of products over the last axis.

    >>> dot(np.ones((2, 3)), np.ones((1, 3)))
    array([3., 3.])
    """
    return np.sum(x * y, axis=-1)


def quotient(x: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """S3, S12: x / flow, (..., tokens, d) by (..., tokens); 0 for a token without features, or
    if the flow is 0.

    >>> quotient(np.array([[2.0], [0.0]]), np.array([4.0, 0.0]))
    array([[0.5],
           [0. ]])
    """
    nothing = np.all(x == 0, axis=-1) | (flow == 0)
    safe = np.where(nothing, np.ones_like(flow), flow)[..., None]
    return np.where(nothing[..., None], np.zeros_like(x), x / safe)


def over_square(x: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """S13: x / flow^2, both (..., tokens), the slope of a quotient, and 0 where the flow is 0.

    >>> over_square(np.array([2.0, 1.0]), np.array([2.0, 0.0]))
    array([0.5, 0. ])
    """
    return np.where(flow == 0, np.zeros_like(x), x / np.where(flow == 0, 1, flow) ** 2)


def clip(Oh: np.ndarray, clamp: Any) -> np.ndarray:
    """S4, K14: Oh within the pair `clamp`, or as it is for None.

    >>> clip(np.array([-5.0, 0.5]), (-1.0, 1.0))
    array([-1. ,  0.5])
    """
    if clamp is None:
        return Oh
    pair = isinstance(clamp, tuple) and len(clamp) == 2
    if not pair or not all(isinstance(x, (int, float)) for x in clamp):
        raise TypeError(f"clamp: got {clamp!r}, expected a pair of numbers or None")
    if not clamp[0] <= clamp[1]:
        raise ValueError(f"clamp: got {clamp!r}, expected a pair that rises")
    return np.minimum(np.maximum(Oh, Oh.dtype.type(clamp[0])), Oh.dtype.type(clamp[1]))


def check_pair(a: Any, b: Any, eps: Any, causal: bool = False) -> None:
    """K14: sinks a and sources b fit one another.

    >>> check_pair(np.ones((1, 2, 3)), np.ones((1, 2, 4)), 0.0)
    Traceback (most recent call last):
    ValueError: b: got 4, expected 3 (d, as in a)
    """
    check_array("a", a, ("heads", "sinks", "d"))
    check_array("b", b, ("heads", "sources", "d"))
    if b.dtype != a.dtype:
        raise TypeError(f"b: got dtype {b.dtype}, expected {a.dtype}, as a")
    if b.shape[:-2] != a.shape[:-2]:
        raise ValueError(f"b: got leading axes {b.shape[:-2]}, expected {a.shape[:-2]}, as a")
    check_size("b", b.shape[-1], a.shape[-1], "d, as in a")
    if causal:
        check_size("b", b.shape[-2], a.shape[-2], "tokens, as in a")
    check_eps(eps)


def check_flow(name: str, x: Any, tokens: np.ndarray) -> None:
    """K14: `x` has one number for each of the tokens (..., heads, tokens, d).

    >>> check_flow("I", np.ones((1, 3)), np.ones((1, 2, 4)))
    Traceback (most recent call last):
    ValueError: I: got shape (1, 3), expected (1, 2)
    """
    check_array(name, x, ())
    if x.shape != tokens.shape[:-1]:
        raise ValueError(f"{name}: got shape {x.shape}, expected {tokens.shape[:-1]}")


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """K14: `mask` is bool and of this shape.

    >>> check_mask("key_mask", np.ones(3, bool), (2,))
    Traceback (most recent call last):
    ValueError: key_mask: got shape (3,), expected (2,)
    """
    check_array(name, mask, (), dtype="bool")
    if mask.shape != shape:
        raise ValueError(f"{name}: got shape {mask.shape}, expected {shape}")


def check_eps(eps: Any) -> None:
    """K14: `eps` is a finite number of at least 0.

    >>> check_eps(None)
    Traceback (most recent call last):
    TypeError: eps: got None, expected a number >= 0
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.number)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")
