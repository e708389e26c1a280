"""NTK-Attention's prefix: its features, its state, its terms, and their place beside a softmax.

Everything here knows queries and a state only; the clauses are those of `ntk_attention`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_choice

POSITIVITY = ("abs", "softplus")


def phi(x: np.ndarray) -> np.ndarray:
    """S2: positive features of x (..., d), of the same shape.

    >>> phi(np.array([3.0])), phi(np.array([-1.0])).round(4)
    (array([4.]), array([0.3679]))
    """
    check_array("x", x, ("d",))
    y = x / x.shape[-1] ** 0.25
    return np.where(y >= 0, 1 + y, np.exp(np.minimum(y, 0)))


def prefix_state(K_P: np.ndarray, V_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """S7: Z (heads, d, dv) and k (heads, d) of a prefix K_P (heads, m, d), V_P (heads, m, dv).

    >>> Z, k = prefix_state(np.zeros((1, 3, 1)), np.array([[[1.0], [2.0], [3.0]]]))
    >>> Z, k
    (array([[[6.]]]), array([[3.]]))
    """
    check_array("K_P", K_P, ("heads", "m", "d"))
    check_array("V_P", V_P, ("heads", "m", "dv"))
    if V_P.dtype != K_P.dtype:
        raise TypeError(f"V_P: got dtype {V_P.dtype}, expected {K_P.dtype}, as K_P")
    if V_P.shape[:-1] != K_P.shape[:-1]:
        raise ValueError(f"V_P: got {V_P.shape[:-1]}, expected {K_P.shape[:-1]}, as K_P")
    features = phi(K_P)
    return np.swapaxes(features, -1, -2) @ V_P, np.sum(features, axis=-2)


def prefix_terms(
    q: np.ndarray, Z: np.ndarray, k: np.ndarray, *, positivity: str = "abs"
) -> tuple[np.ndarray, np.ndarray]:
    """S3: num (..., heads, q_tokens, dv) and den (..., heads, q_tokens) of the queries
    q (..., heads, q_tokens, d), with Z (heads, d, dv) and k (heads, d).

    >>> num, den = prefix_terms(np.zeros((1, 1, 2)), np.eye(2)[None], np.array([[-1.0, 2.0]]))
    >>> num, den
    (array([[[1., 1.]]]), array([[3.]]))
    """
    check_array("q", q, ("heads", "q_tokens", "d"))
    check_prefix(q, Z, k, positivity)
    features = phi(q)
    return features @ Z, np.einsum("...htd,hd->...ht", features, positive(k, positivity))


def merge_prefix(
    softmax_out: np.ndarray, lse: np.ndarray, num: np.ndarray, den: np.ndarray
) -> np.ndarray:
    """S6: outputs (..., q_tokens, dv) from those of softmax attention and the prefix terms.

    softmax_out and num (..., q_tokens, dv), lse and den (..., q_tokens). lse is natural (K5), and
    -inf with a softmax_out of 0 where no key is visible.

    >>> merge_prefix(np.array([[5.0]]), np.array([0.0]), np.array([[1.0]]), np.array([1.0]))
    array([[3.]])
    """
    check_array("softmax_out", softmax_out, ("q_tokens", "dv"))
    rows = softmax_out.shape[:-1]
    for name, x, shape in (("lse", lse, rows), ("num", num, softmax_out.shape), ("den", den, rows)):
        check_array(name, x, ("q_tokens", "dv")[: len(shape) - len(rows) + 1])
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {shape}, as softmax_out")
    weights, unit, total, _ = shares(lse[..., None], num, den)
    return weights * softmax_out + unit[..., None] * num / total[..., None]


def phi_slope(x: np.ndarray) -> np.ndarray:
    """S8: the derivative of `phi`, elementwise.

    >>> phi_slope(np.array([3.0])), phi_slope(np.array([-1.0])).round(4)
    (array([1.]), array([0.3679]))
    """
    width = x.shape[-1] ** 0.25
    return np.exp(np.minimum(x / width, 0)) / width


def positive(k: np.ndarray, positivity: str) -> np.ndarray:
    """S3: ``|k|`` or softplus(k).

    >>> positive(np.array([-2.0]), "abs"), positive(np.array([0.0]), "softplus").round(4)
    (array([2.]), array([0.6931]))
    """
    return np.abs(k) if positivity == "abs" else np.logaddexp(np.zeros_like(k), k)


def positive_slope(k: np.ndarray, positivity: str) -> np.ndarray:
    """S8: the derivative of `positive`; that of ``|k|`` at 0 is 0.

    >>> positive_slope(np.array([-2.0, 0.0]), "abs"), positive_slope(np.zeros(1), "softplus")
    (array([-1.,  0.]), array([0.5]))
    """
    return np.sign(k) if positivity == "abs" else np.exp(-positive(-k, positivity))


def row_top(scores: np.ndarray, held: np.ndarray) -> np.ndarray:
    """S5: m (...) of scores (..., keys), hidden ones -inf; `held` (...) where the prefix counts.

    >>> row_top(np.array([[-3.0], [-3.0]]), np.array([True, False]))
    array([ 0., -3.])
    """
    top = np.max(scores, axis=-1, initial=-np.inf)
    top = np.where(held, np.maximum(top, 0), top)
    return np.where(np.isneginf(top), np.zeros_like(top), top)


def shares(
    scores: np.ndarray, num: np.ndarray, den: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S4, S5: weights e^s / D (..., keys) of the keys, and e^-m, e^-m D and m (...).

    scores (..., keys), hidden ones -inf; num (..., dv), den (...). Where D is 0 the first three are
    0, 0 and 1.

    >>> shares(np.array([[0.0, -np.inf]]), np.array([[1.0]]), np.array([3.0]))
    (array([[0.25, 0.  ]]), array([1.]), array([4.]), array([0.]))
    """
    held = (den != 0) | np.any(num != 0, axis=-1)
    m = row_top(scores, held)
    weights = np.exp(scores - m[..., None])
    # Only a row without a prefix has m < 0. Kept finite there, the factor times 0 is 0.
    unit = np.exp(np.minimum(-m, np.log(np.finfo(scores.dtype).max) - 1)).astype(scores.dtype)
    total = np.sum(weights, axis=-1) + unit * den
    empty = total == 0
    total = np.where(empty, np.ones_like(total), total)
    return weights / total[..., None], np.where(empty, np.zeros_like(unit), unit), total, m


def check_prefix(q: np.ndarray, Z: Any, k: Any, positivity: Any) -> None:
    """S3, K14: the state Z (heads, d, dv), k (heads, d) fits q (..., heads, q_tokens, d).

    >>> check_prefix(np.zeros((2, 1, 4)), np.zeros((2, 3, 5)), np.zeros((2, 4)), "abs")
    Traceback (most recent call last):
    ValueError: Z: got shape (2, 3, 5), expected (2, 4, dv)
    """
    heads, d = q.shape[-3], q.shape[-1]
    check_array("Z", Z, ("heads", "d", "dv"))
    check_array("k", k, ("heads", "d"))
    for name, x in (("Z", Z), ("k", k)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {q.dtype}, as q")
    if Z.ndim != 3 or Z.shape[:2] != (heads, d):
        raise ValueError(f"Z: got shape {Z.shape}, expected ({heads}, {d}, dv)")
    if k.shape != (heads, d):
        raise ValueError(f"k: got shape {k.shape}, expected ({heads}, {d})")
    check_choice("positivity", positivity, POSITIVITY)
