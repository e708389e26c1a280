r"""StreamingLLM, continued: the gradient of a stream.

Which rows a call reads depends on how many tokens have come, not on what they hold. The gradient of
a stream is therefore that of softmax attention, call by call, over the rows each call saw.

Definition
----------
S16. **Gradient.** With :math:`p_{ij}` the weights of a call's query i over its rows j, :math:`do_i`
the upstream gradient and :math:`\hat q, \hat k` rotated as in S7: :math:`dv_j = \sum_i p_{ij}
do_i`, :math:`ds_{ij} = p_{ij} (do_i \cdot v_j - do_i \cdot o_i)`, :math:`d\hat q_i = d^{-1/2}
\sum_j ds_{ij} \hat k_j`, :math:`d\hat k_j = d^{-1/2} \sum_i ds_{ij} \hat q_i`. Rotating
:math:`d\hat q` and :math:`d\hat k` back, to the opposite positions, gives dq and dk. A key or value
collects from every call that saw it, a sink from all of them, and a kv head from its group. ALiBi's
slopes are constants.

Paper and code
--------------
The method needs no training, and the authors' code has no gradient of it; S16 is ours. It is that
of a model trained with the view of S10.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnspec.reference.cache.streaming_llm_rows import (
    alibi_bias,
    cache_positions,
    call_sizes,
    check_call,
    evict_rows,
    rope,
)
from attnspec.reference.conventions import causal_mask, check_shaped, default_scale, repeat_heads
from attnspec.reference.dense.attention import score
from attnspec.reference.dense.attention_gradient import score_gradient, sum_groups
from attnspec.reference.primitives.softmax import softmax_lse, weights_given_lse


def streaming_attend_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    dout: np.ndarray,
    S: int = 4,
    R: int = 512,
    chunk: int | Sequence[int] = 1,
    rope_base: float | None = None,
    alibi_slopes: np.ndarray | None = None,
    rotary_dims: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S16: gradients dq, dk, dv, shaped as q, k, v.

    `dout` (..., heads, T, dv) is the gradient of the output of `streaming_attend`, whose other
    arguments these are.

    >>> x = np.ones((1, 3, 2))
    >>> streaming_attend_backward(x, x, x, x, S=1, R=1)[2][0, :, 0].round(3)
    array([1.833, 0.833, 0.333])
    """
    check_call(q, k, v, S, R, rope_base, alibi_slopes, rotary_dims)
    check_shaped("dout", dout, (*q.shape[:-1], v.shape[-1]))
    heads, kv_heads, scale = q.shape[-3], k.shape[-3], default_scale(q.shape[-1])
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    kept, seen = np.arange(0), 0
    for size in call_sizes(q.shape[-2], chunk):
        new = np.arange(seen, seen + size)
        rows = np.concatenate([kept, new])
        p_q, p_k = cache_positions(len(kept), size)
        queries, keys = q[..., new, :], k[..., rows, :]
        if rope_base is not None:
            queries = rope(queries, p_q, rope_base, rotary_dims)
            keys = rope(keys, p_k, rope_base, rotary_dims)
        scores = score(queries, keys)
        if alibi_slopes is not None:
            scores = scores + alibi_bias(alibi_slopes.astype(q.dtype), p_q, p_k)
        allowed = causal_mask(size, len(rows))
        # Recomputed from the normaliser, as a kernel that kept only this does.
        weights = weights_given_lse(scores, softmax_lse(scores, allowed)[1], allowed)
        values, upstream = repeat_heads(v[..., rows, :], heads), dout[..., new, :]
        dscores, _ = score_gradient(weights, values, upstream)
        dqueries = scale * (dscores @ repeat_heads(keys, heads))
        dkeys = sum_groups(scale * (np.swapaxes(dscores, -1, -2) @ queries), kv_heads)
        if rope_base is not None:
            dqueries = rope(dqueries, -p_q, rope_base, rotary_dims)
            dkeys = rope(dkeys, -p_k, rope_base, rotary_dims)
        dq[..., new, :] = dqueries
        dk[..., rows, :] += dkeys
        dv[..., rows, :] += sum_groups(np.swapaxes(weights, -1, -2) @ upstream, kv_heads)
        kept, seen = rows[evict_rows(len(rows), S, R)], seen + size
    return dq, dk, dv
