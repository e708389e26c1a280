r"""MoA: what it costs the loss to hide an entry of the attention.

Definition
----------
S10. **Influence.** P are the attention weights of a head, o = P V, g the gradient of the loss with
respect to o, and :math:`G = g V^T` that with respect to P. Hiding entry (t, u) and renormalising
the row changes the loss, to first order, by

.. math:: E_{tu} = - P_{tu} \frac{G_{tu} - \sum_n P_{tn} G_{tn}}{1 - P_{tu} + \varepsilon}.

Row 0 has one key, and nothing to renormalise: :math:`E_{0u} = -P_{0u} G_{0u}`. So has an entry with
P = 1 if :math:`\varepsilon = 0`. An entry with P = 0 has E = 0. For a loss that is linear in o the
change is exactly E (with :math:`\varepsilon = 0`).

S11. **Blocks.** The influence I of a block is the sum of abs(E) over its b by b entries with
u <= t. The influences of calibration samples of one length are averaged; those of the query heads
that share a kv head, whose rule they share, are reduced to their maximum.

The loss is the mean cross entropy of the tokens of the answer alone, and the answers are those of
the dense model: it is asked about something far back in a text of several news articles. Profiles
are taken at several lengths. The softmax is in float32, :math:`\varepsilon` the machine epsilon of
that dtype, and the weights are then rounded to the model's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    causal_mask,
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
    group_size,
    repeat_heads,
)
from attnspec.reference.dense.attention import score
from attnspec.reference.primitives.softmax import softmax_lse

EPSILON = 2.0**-23


def influence(P: np.ndarray, V: np.ndarray, g: np.ndarray, eps: float = EPSILON) -> np.ndarray:
    """S10: E (..., heads, T, T), the change of the loss if an entry is hidden.

    P (..., heads, T, T), V (..., kv_heads, T, dv), g (..., heads, T, dv).

    >>> P, V = np.array([[[1.0, 0.0], [0.5, 0.5]]]), np.array([[[1.0], [3.0]]])
    >>> influence(P, V, np.ones((1, 2, 1)), eps=0.0)
    array([[[-1.,  0.],
            [ 1., -1.]]])
    """
    check_array("P", P, ("heads", "T", "T"))
    check_array("V", V, ("kv_heads", "T", "dv"))
    check_size("P", P.shape[-1], P.shape[-2], "keys, as many as queries")
    check_size("V", V.shape[-2], P.shape[-1], "tokens, as in P")
    group_size(P.shape[-3], V.shape[-3])
    _check_gradient(g, (*P.shape[:-1], V.shape[-1]))
    check_epsilon(eps)
    hidden = P == 0
    G = np.where(hidden, np.zeros_like(P), g @ np.swapaxes(repeat_heads(V, P.shape[-3]), -1, -2))
    mean = np.sum(P * G, axis=-1, keepdims=True)
    rest = 1 - P + eps
    alone = (np.arange(P.shape[-2])[:, None] == 0) | (rest == 0)
    share = np.where(alone, G, (G - mean) / np.where(alone, np.ones_like(rest), rest))
    return np.where(hidden, np.zeros_like(P), -P * share)


def block_sum(E: np.ndarray, b: int = 64) -> np.ndarray:
    """S11: (..., T / b, T / b), sums of `E` (..., T, T) over blocks, entries u > t left out.

    >>> block_sum(np.ones((4, 4)), b=2)
    array([[3., 0.],
           [4., 3.]])
    """
    check_array("E", E, ("T", "T"))
    check_integer("b", b, least=1)
    T = E.shape[-1]
    check_size("E", E.shape[-2], T, "rows, as many as columns")
    check_blocks("E", T, b)
    lower = np.where(causal_mask(T, T), E, np.zeros_like(E))
    return lower.reshape(*E.shape[:-2], T // b, b, T // b, b).sum(axis=(-3, -1))


def block_influence(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    g: np.ndarray,
    b: int = 64,
    *,
    eps: float = EPSILON,
    scale: float | None = None,
) -> np.ndarray:
    """S10, S11: I (..., heads, T / b, T / b) of causal attention, 0 above the diagonal.

    q (..., heads, T, d), k (..., kv_heads, T, d), v (..., kv_heads, T, dv), g (..., heads, T, dv).

    >>> q, v = np.zeros((1, 2, 1)), np.array([[[1.0], [3.0]]])
    >>> block_influence(q, q, v, np.ones((1, 2, 1)), b=1, eps=0.0)
    array([[[1., 0.],
            [1., 1.]]])
    """
    check_attention_inputs(q, k, v)
    T = q.shape[-2]
    check_size("k", k.shape[-2], T, "tokens, as in q")
    _check_gradient(g, (*q.shape[:-1], v.shape[-1]))
    check_integer("b", b, least=1)
    check_blocks("q", T, b)
    weights, _ = softmax_lse(score(q, k, scale=scale), causal_mask(T, T))
    return block_sum(np.abs(influence(weights, v, g, eps)), b)


def group_influence(I: np.ndarray, kv_heads: int, interleaved: bool = False) -> np.ndarray:
    """S11: (..., kv_heads, nb, nb), the largest influence among the query heads of a group.

    I (..., heads, nb, nb). `interleaved` takes heads h, h + kv_heads, ... together, as the authors'
    code does, instead of neighbours (K7).

    >>> group_influence(np.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1), 2).ravel()
    array([2., 4.])
    """
    check_array("I", I, ("heads", "nb", "nb"))
    check_integer("kv_heads", kv_heads, least=1)
    heads = I.shape[-3]
    if heads % kv_heads:
        raise ValueError(f"kv_heads: got {kv_heads}, expected a divisor of {heads} heads")
    split = (heads // kv_heads, kv_heads) if interleaved else (kv_heads, heads // kv_heads)
    parts = I.reshape(*I.shape[:-3], *split, *I.shape[-2:])
    return parts.max(axis=-4 if interleaved else -3)


def check_blocks(name: str, T: int, b: int) -> None:
    """K14: `T` tokens are whole blocks."""
    if T % b:
        raise ValueError(f"{name}: got {T} tokens, expected a multiple of {b} (b)")


def check_epsilon(eps: Any) -> None:
    """K14: `eps` is a number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float, np.floating)):
        raise TypeError(f"eps: got {eps!r}, expected a number >= 0")
    if not eps >= 0:
        raise ValueError(f"eps: got {eps}, expected a number >= 0")


def _check_gradient(g: Any, shape: tuple[int, ...]) -> None:
    check_array("g", g, ("heads", "T", "dv"))
    if g.shape != shape:
        raise ValueError(f"g: got shape {g.shape}, expected {shape}")
