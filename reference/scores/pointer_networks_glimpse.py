r"""Pointer networks, continued: the glimpse, an extension that later networks add.

Definition
----------
S7. **Glimpse.** :math:`g_i = \sum_j p_{ij} (W_1 e_j + b_1)`: the attention output proper, with
the projected encoder states as values. Networks that use it mix :math:`g_i` into the decoder
state; `pointer_networks_model` shows one way. The paper's model has none.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array
from attnspec.reference.dense.attention import combine
from attnspec.reference.scores.pointer_networks_gradients import sum_outer, sum_rows
from attnspec.reference.scores.pointer_networks_inputs import (
    check_output_gradient,
    check_projection,
    check_same_dtype,
    check_vector,
)


def glimpse(
    e: np.ndarray, logp: np.ndarray, W1: np.ndarray, *, b1: np.ndarray | None = None
) -> np.ndarray:
    """S7: the averages (..., steps, A) of W1 e_j + b1 under the pointer's probabilities.

    e (..., slots, D); logp (..., steps, slots) as `pointer_log_probs` returns it; W1 (A, D); b1
    (A). A state to which no step may point is not read (K11).

    >>> glimpse(np.array([[2.0], [4.0]]), np.log(np.full((1, 2), 0.5)), np.ones((1, 1)))
    array([[3.]])
    """
    check_glimpse(e, logp, W1, b1)
    projected = e @ W1.T if b1 is None else e @ W1.T + b1
    return combine(np.exp(logp)[..., None, :, :], projected[..., None, :, :])[..., 0, :, :]


def glimpse_backward(
    e: np.ndarray,
    logp: np.ndarray,
    W1: np.ndarray,
    dout: np.ndarray,
    *,
    b1: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""S7: gradients de, dlogp, dW1, db1 of the glimpse.

    With :math:`x_j = W_1 e_j + b_1`: :math:`d\log p_{ij} = p_{ij}\, dout_i \cdot x_j` and
    :math:`dx_j = \sum_i p_{ij}\, dout_i`. `dout` (..., steps, A).

    >>> one = np.ones((1, 1))
    >>> [x.item() for x in glimpse_backward(2 * one, 0 * one, 3 * one, one)]
    [3.0, 6.0, 2.0, 1.0]
    """
    check_glimpse(e, logp, W1, b1)
    check_output_gradient(dout, (*logp.shape[:-1], W1.shape[0]))
    weights = np.exp(logp)
    e = np.where(np.all(weights == 0, axis=-2)[..., None], 0, e)
    projected = e @ W1.T if b1 is None else e @ W1.T + b1
    dlogp = weights * (dout @ np.swapaxes(projected, -1, -2))
    dprojected = np.swapaxes(weights, -1, -2) @ dout
    return dprojected @ W1, dlogp, sum_outer(dprojected, e), sum_rows(dprojected)


def check_glimpse(e: np.ndarray, logp: np.ndarray, W1: np.ndarray, b1: np.ndarray | None) -> None:
    """S7, K14: e (..., slots, D), logp (..., steps, slots), W1 (A, D) and b1 (A) fit.

    >>> check_glimpse(np.ones((2, 1)), np.ones((1, 3)), np.ones((1, 1)), None)
    Traceback (most recent call last):
    ValueError: logp: got shape (1, 3), expected (steps, 2)
    """
    check_array("e", e, ("slots", "D"))
    check_array("logp", logp, ("steps", "slots"))
    check_same_dtype("logp", logp, e)
    if logp.shape[:-2] != e.shape[:-2] or logp.shape[-1] != e.shape[-2]:
        expected = ", ".join(map(str, (*e.shape[:-2], "steps", e.shape[-2])))
        raise ValueError(f"logp: got shape {logp.shape}, expected ({expected})")
    check_projection("W1", W1, e, "e")
    if b1 is not None:
        check_vector("b1", b1, W1)
