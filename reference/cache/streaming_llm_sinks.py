r"""StreamingLLM, continued: three ways to give a model a sink of its own when it is trained.

If the weights of a row need not sum to one, no token has to absorb the attention that nothing
deserves. The denominator gets a constant (zero sink), a learned logit a head, or the model gets a
learned first token to lean on. The clauses go on from those of `streaming_llm`.

Definition
----------
S12. **Zero sink.** :math:`p_j = e^{x_j} / (1 + \sum_l e^{x_l})`, with the gradient :math:`dx_j =
p_j (dp_j - \sum_l p_l dp_l)`. It is the softmax with one more key of logit 0 and value 0. With
:math:`m = \max(0, \max_l x_l)` it is computed as :math:`e^{x_j - m} / (e^{-m} + \sum_l e^{x_l -
m})`. The log normaliser is :math:`\log(1 + \sum_l e^{x_l})`; if nothing is visible, it and the
weights are 0.

S13. **Sink logit.** A scalar :math:`s_h` for each query head: :math:`\ell_i = \log(e^{s_h} +
\sum_j e^{x_{ij}})`, :math:`p_{ij} = e^{x_{ij} - \ell_i}` over the visible keys and
:math:`p_{i,sink} = e^{s_h - \ell_i}`, which has no value. :math:`s_h = 0` is S12, :math:`s_h \to
-\infty` the plain softmax. A row that sees no key has output 0 and :math:`\ell_i = s_h` (K4).

S14. **Its gradient.** Scores, queries, keys and values as for plain attention, with weights that
sum to less than one; :math:`ds_h = \sum_i p_{i,sink} (d\ell_i - \sum_j p_{ij} dp_{ij})`, summed
over the batch too. A row that sees no key adds 0 through its output.

S15. **Sink token.** One trained embedding e stands before every training sample, at position 0 and
without a loss; at inference S = 1 keeps exactly that token.

Paper and code
--------------
The training code of these variants was not released: S12 and S15 follow the paper's formulas. S13
generalises S12 in the form that later models adopted; it is not in the paper.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_shaped,
    check_size,
    default_scale,
    repeat_heads,
)
from attnspec.reference.dense.attention import combine, score, visible
from attnspec.reference.dense.attention_gradient import score_gradient, sum_groups
from attnspec.reference.primitives.softmax import (
    softmax_backward,
    softmax_lse,
    weights_given_lse,
)


def softmax1(x: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """S12: weights shaped as `x`, which sum to less than one over `axis`; -inf hides an entry.

    >>> softmax1(np.array([0.0, np.log(2.0)]))
    array([0.25, 0.5 ])
    """
    _check_axis(x, axis)
    top = np.max(x, axis=axis, keepdims=True, initial=0.0)
    weights = np.exp(x - top)
    return weights / (np.exp(-top) + np.sum(weights, axis=axis, keepdims=True))


def softmax1_backward(x: np.ndarray, dout: np.ndarray, *, axis: int = -1) -> np.ndarray:
    """S12: the gradient of `x`, from `dout`, that of the weights; both shaped as `x`.

    >>> softmax1_backward(np.array([0.0]), np.array([1.0]))
    array([0.25])
    """
    _check_axis(x, axis)
    check_shaped("dout", dout, x.shape)
    weights = np.moveaxis(softmax1(x, axis=axis), axis, -1)
    return np.moveaxis(softmax_backward(weights, np.moveaxis(dout, axis, -1)), -1, axis)


def softmax_with_sink(
    scores: np.ndarray, s_h: np.ndarray, mask: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S13: weights, the sink's weight and lse; the last two are (..., heads, q_tokens).

    `scores` and weights (..., heads, q_tokens, k_tokens), `s_h` (heads), `mask` bool,
    broadcastable to the scores.

    >>> weights, sink, lse = softmax_with_sink(np.zeros((1, 1, 2)), np.array([np.log(2.0)]))
    >>> weights, sink
    (array([[[0.25, 0.25]]]), array([[0.5]]))
    """
    check_array("scores", scores, ("heads", "q_tokens", "k_tokens"))
    _check_sink(s_h, scores.shape[-3], scores.dtype)
    if mask is not None:
        check_array("mask", mask, ("k_tokens",), dtype="bool")
        scores = np.where(mask, scores, -np.inf)
    sink = np.zeros_like(scores, shape=(*scores.shape[:-1], 1)) + s_h[:, None, None]
    weights, lse = softmax_lse(np.concatenate([scores, sink], axis=-1))
    return weights[..., :-1], weights[..., -1], lse


def attend_with_sink_logit(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s_h: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """S13: output (..., heads, q_tokens, dv) and lse (..., heads, q_tokens), the sink included.

    q (..., heads, q_tokens, d), k (..., kv_heads, k_tokens, d), v (..., kv_heads, k_tokens, dv),
    `s_h` (heads); `mask` bool, broadcastable to the scores, True = visible.

    >>> one = np.ones((1, 1, 1))
    >>> out, lse = attend_with_sink_logit(0 * one, one, one, np.array([0.0]))
    >>> out
    array([[[0.5]]])
    """
    check_attention_inputs(q, k, v)
    _check_sink(s_h, q.shape[-3], q.dtype)
    allowed = visible(q.shape[-2], k.shape[-2], mask=mask)
    weights, _, lse = softmax_with_sink(score(q, k, scale=scale), s_h, allowed)
    return combine(weights, v), lse


def attend_with_sink_logit_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s_h: np.ndarray,
    mask: np.ndarray | None,
    dout: np.ndarray,
    dlse: np.ndarray | None = None,
    *,
    scale: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S14: gradients dq, dk, dv and ds, shaped as q, k, v and s_h.

    `dout` (..., heads, q_tokens, dv) and `dlse` (..., heads, q_tokens) are the gradients of the two
    outputs of `attend_with_sink_logit`; no `dlse` means lse is not used.

    >>> one = np.ones((1, 1, 1))
    >>> gradients = attend_with_sink_logit_backward(0 * one, one, one, np.array([0.0]), None, one)
    >>> [gradient.item() for gradient in gradients]
    [0.25, 0.0, 0.5, -0.25]
    """
    check_attention_inputs(q, k, v)
    _check_sink(s_h, q.shape[-3], q.dtype)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    if dlse is not None:
        check_shaped("dlse", dlse, q.shape[:-1])
    heads, scale = q.shape[-3], default_scale(q.shape[-1]) if scale is None else scale
    allowed = visible(q.shape[-2], k.shape[-2], mask=mask)
    scores = score(q, k, scale=scale)
    _, sink, lse = softmax_with_sink(scores, s_h, allowed)
    weights = weights_given_lse(scores, lse, allowed)
    unread = np.all(weights == 0, axis=-2)[..., None]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    keys = np.where(unread, np.zeros_like(keys), keys)
    values = np.where(unread, np.zeros_like(values), values)

    dscores, row_term = score_gradient(weights, values, dout, dlse)
    dsink = -sink * row_term if dlse is None else sink * (dlse - row_term)
    dq = scale * (dscores @ keys)
    dk = scale * (np.swapaxes(dscores, -1, -2) @ q)
    dv = np.swapaxes(weights, -1, -2) @ dout
    every_row = (*range(dsink.ndim - 2), -1)
    return (
        dq,
        sum_groups(dk, k.shape[-3]),
        sum_groups(dv, v.shape[-3]),
        np.sum(dsink, axis=every_row),
    )


def prepend_sink_token(x: np.ndarray, e: np.ndarray) -> np.ndarray:
    """S15: embeddings (..., 1 + tokens, d_model): `e` (d_model), then `x` (..., tokens, d_model).

    >>> prepend_sink_token(np.zeros((2, 1)), np.ones(1)).ravel()
    array([1., 0., 0.])
    """
    check_array("x", x, ("tokens", "d_model"))
    check_array("e", e, ("d_model",))
    check_size("e", e.shape[-1], x.shape[-1], "d_model, as in x")
    first = np.zeros_like(x, shape=(*x.shape[:-2], 1, x.shape[-1])) + e
    return np.concatenate([first, x], axis=-2)


def _check_axis(x: Any, axis: Any) -> None:
    check_array("x", x, ("entries",))
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis: got {axis!r}, expected an integer")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis: got {axis}, expected one of the {x.ndim} axes of x")


def _check_sink(s_h: Any, heads: int, dtype: np.dtype) -> None:
    check_array("s_h", s_h, ("heads",))
    if s_h.shape != (heads,):
        raise ValueError(f"s_h: got shape {s_h.shape}, expected ({heads},), heads as in q")
    if s_h.dtype != dtype:
        raise TypeError(f"s_h: got dtype {s_h.dtype}, expected {dtype}, as q")
