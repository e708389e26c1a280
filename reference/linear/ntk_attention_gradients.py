"""NTK-Attention, the gradient: the clause S8 of `ntk_attention`."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_shaped, default_scale, repeat_heads
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.ntk_attention_prefix import (
    phi,
    phi_slope,
    positive,
    positive_slope,
    prefix_terms,
    shares,
)
from attnspec.reference.linear.ntk_attention_scores import check_inputs, visible_scores


def ntk_backward(
    q: np.ndarray,
    K: np.ndarray,
    V: np.ndarray,
    Z: np.ndarray,
    k: np.ndarray,
    dout: np.ndarray,
    *,
    causal: bool = False,
    key_mask: np.ndarray | None = None,
    scale: float | None = None,
    positivity: str = "abs",
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S8: gradients dq, dK, dV, dZ, dk of `ntk_attend`, shaped as q, K, V, Z, k.

    >>> x, one = np.zeros((1, 1, 1)), np.ones((1, 1, 1))
    >>> [float(g.squeeze()) for g in ntk_backward(x, x, 5 * one, one, one[0], one)]
    [-1.0, 0.0, 0.5, 0.5, -1.5]
    """
    check_inputs(q, K, V, Z, scale)
    num, den = prefix_terms(q, Z, k, positivity=positivity)
    check_shaped("dout", dout, num.shape)
    factor = default_scale(q.shape[-1]) if scale is None else scale
    scores = visible_scores(q, K, causal, key_mask, scale)
    _, unit, total, m = shares(scores, num, den)
    # Formed again from the log of D, which is all that has to be kept of them.
    weights = np.exp(scores - (m + np.log(total))[..., None])
    unread = np.all(weights == 0, axis=-2)[..., None]
    keys, values = (
        np.where(unread, np.zeros_like(x), x)
        for x in (repeat_heads(y, q.shape[-3]) for y in (K, V))
    )
    out = weights @ values + unit[..., None] * num / total[..., None]
    row_term = np.einsum("...d,...d->...", dout, out)
    dscores = weights * (dout @ np.swapaxes(values, -1, -2) - row_term[..., None])
    dK = factor * (np.swapaxes(dscores, -1, -2) @ q)
    dV = np.swapaxes(weights, -1, -2) @ dout

    dnum = unit[..., None] * dout / total[..., None]
    dden = -unit * row_term / total
    features, kappa = phi(q), positive(k, positivity)
    dZ = np.einsum("...htd,...hte->...hde", features, dnum)
    dkappa = np.einsum("...htd,...ht->...hd", features, dden)
    dfeatures = dnum @ np.swapaxes(Z, -1, -2) + dden[..., None] * kappa[..., None, :]
    dq = factor * (dscores @ keys) + phi_slope(q) * dfeatures
    batch = tuple(range(q.ndim - 3))
    return (
        dq,
        sum_groups(dK, K.shape[-3]),
        sum_groups(dV, V.shape[-3]),
        np.sum(dZ, axis=batch),
        positive_slope(k, positivity) * np.sum(dkappa, axis=batch),
    )
