r"""LightNet's position encodings: their gradients.

Definition
----------
S18. **Gradients.** With d' and d'' those of the two halves y' and y'' of the result of S13:
:math:`da = d'' y' - d' y''`. In the cosine form :math:`dx = d' \cos a + d'' \sin a`, in the rotary
form dx is d turned by -a. Of S12 :math:`d\theta_c` is the sum of :math:`p_i\, da` over tokens, over
the batch and over the axes i that have c. S14 is S5 with queries :math:`q_p`, keys :math:`k_p` and
the log decay :math:`\log \lambda` at every token and channel, so that S9 gives its gradients; those
of parameters are summed over tokens and the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.linear.lightnet_positions import (
    Parameters,
    check_grid_filters,
    join_heads,
    md_angles,
    md_lrpe,
    split_heads,
    tpe,
)
from attnspec.reference.linear.lightnet_scan import vector_decay_backward


def md_lrpe_backward(
    x: np.ndarray,
    theta: np.ndarray,
    shape: Sequence[int],
    l: int,
    dout: np.ndarray,
    *,
    lrpe_type: str = "cosine",
) -> tuple[np.ndarray, np.ndarray]:
    """S18: dx and dtheta of `md_lrpe`; dout is shaped as its output.

    >>> x, theta = np.array([[[3.0], [2.0]]]), np.zeros((1, 1))
    >>> dx, dtheta = md_lrpe_backward(x, theta, (2,), 0, np.ones((1, 2, 2)))
    >>> dx.ravel(), dtheta.ravel()
    (array([1., 1.]), array([2.]))
    """
    y = md_lrpe(x, theta, shape, l, lrpe_type=lrpe_type)
    check_shaped("dout", dout, y.shape)
    width = y.shape[-1] // 2
    angles = md_angles(shape, theta, width, l)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    one, other = dout[..., :width], dout[..., width:]
    turned = one * cos + other * sin
    dangles = other * y[..., :width] - one * y[..., width:]
    dx = turned
    if lrpe_type == "rotary":
        dx = np.concatenate([turned, other * cos - one * sin], axis=-1)
    dangles = _summed(dangles, 3)[:, l:]
    places = np.moveaxis(np.indices(shape), 0, -1).reshape(-1, len(shape)).astype(theta.dtype)
    dtheta = np.zeros_like(theta)
    for axis in range(len(shape)):
        own = dangles[..., axis * theta.shape[1] :][..., : theta.shape[1]]
        dtheta[:, : own.shape[-1]] += np.einsum("t,htc->hc", places[:, axis], own)
    return dx, dtheta


def tpe_backward(
    x: np.ndarray,
    qp: np.ndarray,
    kp: np.ndarray,
    lam: np.ndarray,
    state: np.ndarray | None,
    dy: np.ndarray,
    dstate: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S18: dx, dqp, dkp, dlam of `tpe` and the gradient of the state before; dy and dstate are
    shaped as its outputs.

    >>> x, two = np.array([[[1.0], [3.0]]]), np.array([[2.0]])
    >>> gradients = tpe_backward(x, two, two, np.array([0.5]), None, np.ones((1, 2, 1)))
    >>> [dx.ravel() for dx in gradients]
    [array([6., 4.]), array([9.]), array([9.]), array([4.]), array([1.5])]
    """
    _, last = tpe(x, qp, kp, lam, state)
    check_shaped("dy", dy, x.shape)
    if dstate is not None:
        check_shaped("dstate", dstate, last.shape)
    tokens = np.zeros_like(x, shape=(*x.shape[:-1], qp.shape[-1]))
    q, k = tokens + qp[:, None], tokens + kp[:, None]
    g = tokens + np.log(lam)[:, None, None]
    dq, dk, dx, dg, before = vector_decay_backward(q, k, x, g, state, dy, dstate)
    dqp, dkp = (_summed(np.sum(z, axis=-2), 2) for z in (dq, dk))
    return dx, dqp, dkp, _summed(np.sum(dg, axis=(-2, -1)), 1) / lam, before


def md_tpe_backward(
    x: np.ndarray, params: Sequence[Parameters], axes: Sequence[int], dy: np.ndarray
) -> tuple[np.ndarray, tuple[Parameters, ...]]:
    """S18: dx and the gradients (dqp, dkp, dlam) of each of params, of `md_tpe`.

    >>> one, x = (np.ones((1, 1)), np.ones((1, 1)), np.ones(1)), np.ones((1, 2, 2, 1))
    >>> md_tpe_backward(x, [one, one], [0, 1], x)[0][0, ..., 0]
    array([[4., 3.],
           [3., 2.]])
    """
    check_grid_filters(x, params, axes)
    check_shaped("dy", dy, x.shape)
    dx, gradients = np.zeros_like(x), []
    for (qp, kp, lam), axis in zip(params, axes, strict=True):
        rows, upstream = (split_heads(z, axis, qp.shape[0]) for z in (x, dy))
        back, *own, _ = tpe_backward(rows, qp, kp, lam, None, upstream)
        dx = dx + join_heads(back, axis)
        gradients.append((own[0], own[1], own[2]))
    return dx, tuple(gradients)


def _summed(x: np.ndarray, dims: int) -> np.ndarray:
    """x summed over all but its last axes."""
    return np.sum(x, axis=tuple(range(x.ndim - dims)))
