r"""The gradients of the model steps of pointer networks.

Definition
----------
S6. **Gradient.** With upstream :math:`g_{ij}` of the scores and :math:`h_{ij} = \tanh(W_1 e_j + b_1
+ W_2 d_i + b_2)`: :math:`dv = \sum_{ij} g_{ij} h_{ij}`; the pre-activation gets :math:`z_{ij} =
g_{ij}\, v \odot (1 - h_{ij}^2)`, so that :math:`dW_1 = \sum_{ij} z_{ij} e_j^\top`, :math:`de_j =
W_1^\top \sum_i z_{ij}`, :math:`dW_2 = \sum_{ij} z_{ij} d_i^\top`, :math:`dd_i = W_2^\top \sum_j
z_{ij}` and :math:`db_1 = db_2 = \sum_{ij} z_{ij}`. Parameters are shared, so their gradients are
summed over every leading axis. Of the log-probabilities: :math:`du_{ij} = g_{ij} - p_{ij} \sum_k
g_{ik}` over the allowed slots, 0 elsewhere. Of the loss over N real steps: :math:`-1/N` at each
target. A slot or a step whose upstream is exactly 0 throughout is not read (K11).
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.primitives.softmax import softmax
from attnspec.reference.scores.pointer_networks_inputs import (
    allowed_slots,
    check_output_gradient,
    check_states,
    real_steps,
)


def pointer_scores_backward(
    e: np.ndarray,
    d: np.ndarray,
    W1: np.ndarray,
    W2: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    *,
    b1: np.ndarray | None = None,
    b2: np.ndarray | None = None,
) -> tuple[np.ndarray, ...]:
    """S6: gradients de, dd, dW1, dW2, dv, db1, db2, each shaped as its argument.

    `dout` (..., steps, slots) is the gradient of the scores; the rest as in `pointer_scores`. An
    absent bias gets the gradient that a bias of zeros has.

    >>> one = np.ones((1, 1))
    >>> zero = np.zeros((1, 1))
    >>> [x.item() for x in pointer_scores_backward(zero, zero, one, one, np.ones(1), one)]
    [1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """
    check_states(e, d, W1, W2, v, b1, b2)
    check_output_gradient(dout, (*d.shape[:-1], e.shape[-2]))
    e = np.where(np.all(dout == 0, axis=-2)[..., None], 0, e)
    d = np.where(np.all(dout == 0, axis=-1)[..., None], 0, d)
    keys = e @ W1.T if b1 is None else e @ W1.T + b1
    queries = d @ W2.T if b2 is None else d @ W2.T + b2
    hidden = np.tanh(queries[..., :, None, :] + keys[..., None, :, :])

    dv = sum_rows(dout[..., None] * hidden)
    dhidden = dout[..., None] * v * (1 - hidden * hidden)
    dkeys, dqueries = np.sum(dhidden, axis=-3), np.sum(dhidden, axis=-2)
    dbias = sum_rows(dkeys)
    return (
        dkeys @ W1,
        dqueries @ W2,
        sum_outer(dkeys, e),
        sum_outer(dqueries, d),
        dv,
        dbias,
        dbias.copy(),
    )


def pointer_log_probs_backward(
    scores: np.ndarray, mask: np.ndarray | None, dout: np.ndarray
) -> np.ndarray:
    """S6: gradient (..., steps, slots) of the scores; exactly 0 where masked.

    `dout` (..., steps, slots) is the gradient of the log-probabilities. What it holds at a masked
    slot is ignored: the log-probability there is the constant -inf.

    >>> pointer_log_probs_backward(np.zeros((1, 2)), None, np.array([[1.0, 0.0]]))
    array([[ 0.5, -0.5]])
    """
    allowed = allowed_slots(scores, mask)
    check_output_gradient(dout, scores.shape)
    if allowed is not None:
        dout = np.where(allowed, dout, 0)
    unread = np.all(dout == 0, axis=-1, keepdims=True)
    weights = softmax(np.where(unread, 0, scores), allowed)
    return dout - weights * np.sum(dout, axis=-1, keepdims=True)


def pointer_loss_backward(
    logp: np.ndarray,
    targets: np.ndarray,
    target_mask: np.ndarray | None,
    dout: np.ndarray | float,
) -> np.ndarray:
    """S6: gradient (..., steps, slots) of `logp`: -dout / N at each of the N real targets.

    `dout` is the gradient of the loss, a scalar; the rest as in `pointer_loss`.

    >>> pointer_loss_backward(np.zeros((2, 2)), np.array([0, 1]), np.array([False, True]), 1.0)
    array([[ 0.,  0.],
           [ 0., -1.]])
    """
    real, target_mask = real_steps(logp, targets, target_mask)
    if np.ndim(dout) != 0:
        raise ValueError(f"dout: got shape {np.shape(dout)}, expected a scalar")
    at_target = np.arange(logp.shape[-1]) == real[..., None]
    chosen = at_target & target_mask[..., None]
    slope = -dout / np.count_nonzero(target_mask)
    return np.where(chosen, slope, np.zeros_like(logp)).astype(logp.dtype)


def sum_rows(x: np.ndarray) -> np.ndarray:
    """S6: the sum of `x` (..., A) over every axis but the last.

    >>> sum_rows(np.ones((2, 3, 1)))
    array([6.])
    """
    return np.sum(x, axis=tuple(range(x.ndim - 1)))


def sum_outer(dy: np.ndarray, x: np.ndarray) -> np.ndarray:
    """S6: the gradient (A, D) of W where rows y = W x: dy (..., rows, A), x (..., rows, D).

    >>> sum_outer(np.ones((2, 3, 1)), np.ones((2, 3, 2)))
    array([[6., 6.]])
    """
    products = np.swapaxes(dy, -1, -2) @ x
    return np.sum(products, axis=tuple(range(products.ndim - 2)))
