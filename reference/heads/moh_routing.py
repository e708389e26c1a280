"""How tokens choose heads with a learned router: the gates of MoH, step by step (S1-S5).

The clauses are those of `moh`. Routers are matrices without bias; a group of heads that is switched
off has no gates, and its step is not called.

Paper and code
--------------
- The authors' models use 50 to 90 % of the heads. Shared + active routed heads of all, in the four
  stages of ViT-B: 4 + 0 of 4, 8 + 0 of 8, 4 + 8 of 16, 5 + 16 of 32 at 75 %, and 2 + 2, 2 + 4,
  2 + 6, 4 + 8 of as many at 50 %. DiT-XL/2 at 90 % has 16 + 3 of 24 in its last nine layers, and
  shared heads alone before.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_array, check_integer, check_size
from attnspec.reference.primitives.softmax import softmax, softmax_backward
from attnspec.reference.primitives.top_k import top_k_mask


def routed_probs(x: np.ndarray, Wr: np.ndarray) -> np.ndarray:
    """S1: r (..., tokens, hr), the softmax over the routed heads.

    x (..., tokens, D) are the tokens that make the queries; Wr (hr, D).

    >>> routed_probs(np.array([[0.0, 1.0]]), np.zeros((4, 2)))
    array([[0.25, 0.25, 0.25, 0.25]])
    """
    return softmax(_logits(x, "Wr", Wr))


def routed_probs_backward(
    x: np.ndarray, Wr: np.ndarray, dp: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """S8: dx and dWr of `routed_probs`.

    >>> x, Wr = np.ones((1, 1)), np.zeros((2, 1))
    >>> routed_probs_backward(x, Wr, np.array([[1.0, 0.0]]))[1].ravel()
    array([ 0.25, -0.25])
    """
    check_array("dp", dp, ("tokens", "hr"))
    return _logits_backward(x, Wr, softmax_backward(routed_probs(x, Wr), dp))


def topk_mask(p: np.ndarray, k: int) -> np.ndarray:
    """S2: bool, shaped as p (..., tokens, hr), True at the `k` largest of each token.

    Ties go to the lower index (K6). ValueError unless 0 <= k <= hr.

    >>> topk_mask(np.array([[0.2, 0.4, 0.4, 0.0]]), 1)
    array([[False,  True, False, False]])
    """
    check_array("p", p, ("tokens", "hr"))
    check_count(k, p.shape[-1])
    return top_k_mask(p, k)


def routed_gates(p: np.ndarray, mask: np.ndarray, k: int, *, rescale: bool = True) -> np.ndarray:
    """S3: gr (..., tokens, hr), 0 where `mask` is False; without `rescale`, p itself elsewhere.

    >>> routed_gates(np.array([[0.1, 0.3, 0.6]]), np.array([[False, True, True]]), 2).round(3)
    array([[0.   , 0.667, 1.333]])
    """
    kept, total = _kept(p, mask, k)
    return k * kept / total if rescale else kept


def routed_gates_backward(
    p: np.ndarray, mask: np.ndarray, k: int, dgr: np.ndarray, *, rescale: bool = True
) -> np.ndarray:
    """S8: dp of `routed_gates`. The choice itself carries no gradient.

    >>> p, mask = np.array([[0.25, 0.25, 0.5]]), np.array([[True, True, False]])
    >>> routed_gates_backward(p, mask, 2, np.array([[1.0, 0.0, 5.0]]))
    array([[ 2., -2.,  0.]])
    """
    kept, total = _kept(p, mask, k)
    check_array("dgr", dgr, ("tokens", "hr"))
    if not rescale:
        return np.where(mask, dgr, np.zeros_like(dgr))
    # Below the floor the divisor is a constant.
    moves = np.sum(kept, axis=-1, keepdims=True) > np.finfo(p.dtype).eps
    inner = np.sum(dgr * kept, axis=-1, keepdims=True) / total
    dkept = k * (dgr - np.where(moves, inner, np.zeros_like(inner))) / total
    return np.where(mask, dkept, np.zeros_like(dkept))


def shared_gates(x: np.ndarray, Ws: np.ndarray, *, rescale: bool = True) -> np.ndarray:
    """S4: gs (..., tokens, hs), whose sum is hs, or 1 without `rescale`; Ws (hs, D).

    >>> shared_gates(np.array([[0.0, 1.0]]), np.zeros((3, 2)))
    array([[1., 1., 1.]])
    """
    gates = softmax(_logits(x, "Ws", Ws))
    return Ws.shape[0] * gates if rescale else gates


def shared_gates_backward(
    x: np.ndarray, Ws: np.ndarray, dgs: np.ndarray, *, rescale: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """S8: dx and dWs of `shared_gates`.

    >>> shared_gates_backward(np.ones((1, 1)), np.zeros((2, 1)), np.array([[1.0, 0.0]]))[1].ravel()
    array([ 0.5, -0.5])
    """
    gates = softmax(_logits(x, "Ws", Ws))
    check_array("dgs", dgs, ("tokens", "hs"))
    factor = Ws.shape[0] if rescale else 1
    return _logits_backward(x, Ws, factor * softmax_backward(gates, dgs))


def group_weights(x: np.ndarray, W0: np.ndarray, *, rescale: bool = True) -> np.ndarray:
    """S5: a (..., tokens, 2), the weights of the shared and of the routed group; W0 (2, D).

    Their sum is 2, or 1 without `rescale`.

    >>> group_weights(np.array([[0.0, 1.0]]), np.zeros((2, 2)))
    array([[1., 1.]])
    """
    weights = softmax(_group_logits(x, W0))
    return 2 * weights if rescale else weights


def group_weights_backward(
    x: np.ndarray, W0: np.ndarray, da: np.ndarray, *, rescale: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """S8: dx and dW0 of `group_weights`.

    >>> group_weights_backward(np.ones((1, 1)), np.zeros((2, 1)), np.array([[1.0, 0.0]]))[1].ravel()
    array([ 0.5, -0.5])
    """
    weights = softmax(_group_logits(x, W0))
    check_array("da", da, ("tokens", "2"))
    return _logits_backward(x, W0, (2 if rescale else 1) * softmax_backward(weights, da))


def combine_gates(
    gs: np.ndarray | None, gr: np.ndarray | None, a: np.ndarray | None = None
) -> np.ndarray:
    """S5: gates (..., tokens, H), the shared heads first.

    gs (..., tokens, hs), gr (..., tokens, hr), a (..., tokens, 2). If one of the groups is None,
    the gates are those of the other, and `a` is ignored.

    >>> combine_gates(np.array([[1.0]]), np.array([[2.0, 0.0]]), np.array([[1.5, 0.5]]))
    array([[1.5, 1. , 0. ]])
    """
    groups = {name: g for name, g in (("gs", gs), ("gr", gr)) if g is not None}
    if not groups:
        raise ValueError("gs: got None for gs and gr, expected at least one of them")
    for name, g in groups.items():
        check_array(name, g, ("tokens", "heads"))
    if gs is None or gr is None:
        return next(iter(groups.values())).copy()
    check_array("a", a, ("tokens", "2"))
    assert a is not None
    for name, x, tail in (("gr", gr, gr.shape[-1:]), ("a", a, (2,))):
        if x.dtype != gs.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {gs.dtype}, as gs")
        if x.shape != (*gs.shape[:-1], *tail):
            raise ValueError(f"{name}: got shape {x.shape}, expected {(*gs.shape[:-1], *tail)}")
    return np.concatenate([a[..., :1] * gs, a[..., 1:] * gr], axis=-1)


def combine_gates_backward(
    gs: np.ndarray, gr: np.ndarray, a: np.ndarray, dgates: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S8: dgs, dgr and da of `combine_gates` with both groups.

    >>> one = np.ones((1, 1))
    >>> combine_gates_backward(2 * one, 3 * one, np.ones((1, 2)), np.ones((1, 2)))[2]
    array([[2., 3.]])
    """
    combine_gates(gs, gr, a)
    check_array("dgates", dgates, ("tokens", "heads"))
    shared, routed = dgates[..., : gs.shape[-1]], dgates[..., gs.shape[-1] :]
    da = [np.sum(d * g, axis=-1, keepdims=True) for d, g in ((shared, gs), (routed, gr))]
    return a[..., :1] * shared, a[..., 1:] * routed, np.concatenate(da, axis=-1)


def check_count(k: Any, hr: int) -> None:
    """S2, K14: the number of active routed heads is at most the number there is.

    >>> check_count(3, 2)
    Traceback (most recent call last):
    ValueError: k: got 3, expected at most the 2 routed heads
    """
    check_integer("k", k, least=0)
    if k > hr:
        raise ValueError(f"k: got {k}, expected at most the {hr} routed heads")


def _logits(x: np.ndarray, name: str, W: np.ndarray) -> np.ndarray:
    check_array("x", x, ("tokens", "D"))
    check_array(name, W, ("heads", "D"))
    if W.dtype != x.dtype:
        raise TypeError(f"{name}: got dtype {W.dtype}, expected {x.dtype}, as x")
    if W.ndim != 2 or W.shape[0] < 1:
        raise ValueError(f"{name}: got shape {W.shape}, expected (heads, D)")
    check_size(name, W.shape[1], x.shape[-1], "D, as in x")
    return np.einsum("...td,hd->...th", x, W)


def _group_logits(x: np.ndarray, W0: np.ndarray) -> np.ndarray:
    logits = _logits(x, "W0", W0)
    check_size("W0", W0.shape[0], 2, "groups, shared and routed")
    return logits


def _logits_backward(
    x: np.ndarray, W: np.ndarray, dlogits: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    dW = np.einsum("...th,...td->...hd", dlogits, x)
    return dlogits @ W, np.sum(dW, axis=tuple(range(x.ndim - 2)))


def _kept(p: np.ndarray, mask: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities that `mask` keeps and what they are divided by (..., tokens, 1)."""
    check_array("p", p, ("tokens", "hr"))
    check_array("mask", mask, ("tokens", "hr"), dtype="bool")
    if mask.shape != p.shape:
        raise ValueError(f"mask: got shape {mask.shape}, expected {p.shape}, as p")
    check_count(k, p.shape[-1])
    kept = np.where(mask, p, np.zeros_like(p))
    total = np.sum(kept, axis=-1, keepdims=True)
    return kept, np.maximum(total, np.finfo(p.dtype).eps)
