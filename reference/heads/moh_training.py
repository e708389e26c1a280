"""MoH's router without parameters, and what training adds: balance and the straight-through gate.

The clauses are those of `moh`.

Paper and code
--------------
- S9 has hs = H // 2 and k = H // 4 in the authors' language model, which asks for an even H: 75 %
  of the heads. Only its inference is published. There the softmax and the std of S9 change nothing,
  and no balance loss is computed; that in training the gradient goes to g is our reading.
- For hr = 1 or equal norms the std in S9 is undefined or 0. The choice does not need it; a uniform
  g, without gradient, is ours.
- The authors add 0.01 times the mean of S10's L over the routed layers to the loss.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_integer
from attnspec.reference.heads.moh_routing import check_count
from attnspec.reference.primitives.softmax import softmax, softmax_backward
from attnspec.reference.primitives.top_k import top_k_mask


def norm_probs(q_unrot: np.ndarray, hs: int) -> np.ndarray:
    """S9: g (..., tokens, hr), the softmax of the routed queries' norms in units of their spread.

    q_unrot (..., H, tokens, dh), projected queries before positions. The spread is the unbiased
    standard deviation over the hr heads; without one (hr = 1, equal norms) g is uniform.

    >>> norm_probs(np.array([[[3.0, 4.0]], [[1.0, 0.0]], [[0.0, 1.0]]]), 1)
    array([[0.5, 0.5]])
    """
    norms = _norms(q_unrot, hs)
    return softmax(norms / _spread(norms)[0])


def norm_probs_backward(q_unrot: np.ndarray, hs: int, dg: np.ndarray) -> np.ndarray:
    """S8, S9: the gradient of q_unrot, 0 for shared heads, for zero queries, and without a spread.

    >>> norm_probs_backward(np.ones((3, 1, 2)), 1, np.array([[1.0, 0.0]])).ravel()
    array([0., 0., 0., 0., 0., 0.])
    """
    norms = _norms(q_unrot, hs)
    check_array("dg", dg, ("tokens", "hr"))
    spread, spreads = _spread(norms)
    dl = softmax_backward(softmax(norms / spread), dg) / spread
    inner = np.sum(dl * norms, axis=-1, keepdims=True) / (spread * spread)
    centred = norms - np.mean(norms, axis=-1, keepdims=True)
    dnorms = dl - inner * centred / max(norms.shape[-1] - 1, 1)
    dnorms = np.swapaxes(np.where(spreads, dnorms, np.zeros_like(dnorms)), -1, -2)[..., None]
    lengths = np.swapaxes(norms, -1, -2)[..., None]
    routed = q_unrot[..., hs:, :, :]
    dq = dnorms * routed / np.where(lengths == 0, np.ones_like(lengths), lengths)
    return np.concatenate([np.zeros_like(q_unrot[..., :hs, :, :]), dq], axis=-3)


def norm_router(q_unrot: np.ndarray, hs: int, k: int) -> np.ndarray:
    """S9: gates (..., tokens, H), 1 for the `hs` shared heads and for the routed ones chosen.

    q_unrot (..., H, tokens, dh). Chosen are the `k` largest norms, ties to the lower index (K6);
    the authors' numbers are hs = H // 2 and k = H // 4. ValueError unless hs + k >= 1.

    >>> norm_router(np.array([[[0.0, 0.0]], [[3.0, 4.0]], [[6.0, 8.0]]]), 1, 1)
    array([[1., 0., 1.]])
    """
    norms = _norms(q_unrot, hs)
    check_count(k, norms.shape[-1])
    if hs + k == 0:
        raise ValueError("k: got 0 without shared heads, expected at least 1")
    shared = np.ones_like(norms, shape=(*norms.shape[:-1], hs))
    chosen = np.where(top_k_mask(norms, k), np.ones_like(norms), np.zeros_like(norms))
    return np.concatenate([shared, chosen], axis=-1)


def straight_through(p: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """S9: gates (..., tokens, hr): the 0/1 of `mask`, whose gradient is handed to p as it is.

    >>> straight_through(np.array([[0.3, 0.7]]), np.array([[False, True]]))
    array([[0., 1.]])
    """
    check_array("p", p, ("tokens", "hr"))
    check_array("mask", mask, ("tokens", "hr"), dtype="bool")
    if mask.shape != p.shape:
        raise ValueError(f"mask: got shape {mask.shape}, expected {p.shape}, as p")
    return np.where(mask, np.ones_like(p), np.zeros_like(p))


def straight_through_backward(p: np.ndarray, mask: np.ndarray, dgates: np.ndarray) -> np.ndarray:
    """S8, S9: dp, the gradient of the gates itself.

    >>> straight_through_backward(np.zeros((1, 2)), np.zeros((1, 2), bool), np.ones((1, 2)))
    array([[1., 1.]])
    """
    straight_through(p, mask)
    check_array("dgates", dgates, ("tokens", "hr"))
    return dgates.copy()


def load_balance_loss(
    p: np.ndarray, mask: np.ndarray, *, valid: np.ndarray | None = None, rescale: bool = True
) -> np.ndarray:
    """S10: L, one number for all tokens of p and mask (..., tokens, hr) together.

    `valid` bool (..., tokens), True = a real token. Without `rescale` the factor hr is left out.
    No token at all means 0.

    >>> p = np.full((3, 4), 0.25)
    >>> load_balance_loss(p, np.array([[True, True, False, False]] * 3)).item()
    2.0
    """
    tokens, share = _usage(p, mask, valid)
    real = p if valid is None else np.where(valid[..., None], p, np.zeros_like(p))
    mean = np.sum(real, axis=tuple(range(p.ndim - 1))) / tokens
    return np.sum(mean * share) * (p.shape[-1] if rescale else 1)


def load_balance_loss_backward(
    p: np.ndarray,
    mask: np.ndarray,
    dloss: np.ndarray,
    *,
    valid: np.ndarray | None = None,
    rescale: bool = True,
) -> np.ndarray:
    """S8, S10: dp, by way of the mean probabilities only: how often a head is chosen is constant.

    >>> p, mask = np.full((1, 2), 0.5), np.array([[True, False]])
    >>> load_balance_loss_backward(p, mask, np.array(1.0))
    array([[2., 0.]])
    """
    tokens, share = _usage(p, mask, valid)
    dp = np.zeros_like(p) + share * (dloss / tokens) * (p.shape[-1] if rescale else 1)
    return dp if valid is None else np.where(valid[..., None], dp, np.zeros_like(dp))


def _norms(q_unrot: np.ndarray, hs: int) -> np.ndarray:
    """The norms (..., tokens, hr) of the routed queries."""
    check_array("q_unrot", q_unrot, ("H", "tokens", "dh"))
    check_integer("hs", hs, least=0)
    if hs >= q_unrot.shape[-3]:
        raise ValueError(f"hs: got {hs}, expected fewer than the {q_unrot.shape[-3]} heads")
    routed = q_unrot[..., hs:, :, :]
    return np.swapaxes(np.sqrt(np.sum(routed * routed, axis=-1)), -1, -2)


def _spread(norms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The unbiased standard deviation (..., tokens, 1), 1 where there is none, and where it is."""
    centred = norms - np.mean(norms, axis=-1, keepdims=True)
    square = np.sum(centred * centred, axis=-1, keepdims=True)
    spread = np.sqrt(square / max(norms.shape[-1] - 1, 1))
    spreads = spread > 0
    return np.where(spreads, spread, np.ones_like(spread)), spreads


def _usage(p: np.ndarray, mask: np.ndarray, valid: np.ndarray | None) -> tuple[int, np.ndarray]:
    """How many tokens count, at least 1, and ce (hr): the share of them that chose each head."""
    check_array("p", p, ("tokens", "hr"))
    check_array("mask", mask, ("tokens", "hr"), dtype="bool")
    if mask.shape != p.shape:
        raise ValueError(f"mask: got shape {mask.shape}, expected {p.shape}, as p")
    counted = np.ones(p.shape[:-1], bool)
    if valid is not None:
        check_array("valid", valid, ("tokens",), dtype="bool")
        if valid.shape != p.shape[:-1]:
            raise ValueError(f"valid: got shape {valid.shape}, expected {p.shape[:-1]}, as p")
        counted = valid
    tokens = max(int(np.sum(counted)), 1)
    chosen = np.sum(mask & counted[..., None], axis=tuple(range(p.ndim - 1)))
    return tokens, chosen.astype(p.dtype) / p.dtype.type(tokens)
