"""LongLoRA's grouped attention, the gradient (S6 of `longlora`)."""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, default_scale, repeat_heads
from attnspec.reference.dense.attention import score
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.patterns.longlora_groups import (
    check_inputs,
    real_pairs,
    segments,
    shift_heads,
)
from attnspec.reference.primitives.softmax import weights_given_lse


def s2_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    out: np.ndarray,
    lse: np.ndarray,
    dout: np.ndarray,
    G: int,
    variant: str = "segments",
    lengths: np.ndarray | None = None,
    causal: bool = True,
    scale: float | None = None,
    *,
    dlse: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """S6: gradients dq, dk, dv, shaped as q, k, v, from the results of `grouped_attend`.

    `dout` (..., H, T, dv) and `dlse` (..., H, T) are upstream; no `dlse` means lse is not used.

    >>> one, lse = np.ones((1, 2, 1)), np.array([[1.0, 1.0 + np.log(2.0)]])
    >>> s2_backward(one, one, one, one, lse, one, 4)[2].ravel()
    array([1.5, 0.5])
    """
    check_inputs(q, k, v, G, variant, lengths, causal)
    H, T = q.shape[-3:-1]
    expected = (*q.shape[:-1], v.shape[-1])
    given = {"out": out, "lse": lse, "dout": dout} | ({} if dlse is None else {"dlse": dlse})
    for name, x in given.items():
        shape = expected if name.endswith("out") else expected[:-1]
        check_array(name, x, ("H", "T"))
        if x.shape != shape:
            raise ValueError(f"{name}: got shape {x.shape}, expected {shape}")
    kv_heads, scale = k.shape[-3], default_scale(q.shape[-1]) if scale is None else scale
    k, v = repeat_heads(k, H), repeat_heads(v, H)
    row_term = np.einsum("...d,...d->...", dout, out)
    rows_of = [lse, row_term if dlse is None else row_term - dlse]
    if variant == "roll":
        q, k, v, dout = (shift_heads(x, G, -1) for x in (q, k, v, dout))
        rows_of = [shift_heads(x[..., None], G, -1)[..., 0] for x in rows_of]
    lse, row_term = rows_of
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for heads, rows in segments(T, G, H, variant):
        cut, at = (..., heads, rows, slice(None)), (..., heads, rows)
        n = rows.stop - rows.start
        seen = np.tri(n, dtype=bool) if causal else np.ones((n, n), bool)
        real = real_pairs(lengths, rows)
        seen = seen if real is None else seen & real
        P = weights_given_lse(score(q[cut], k[cut], scale=scale), lse[at], seen)
        # What is padded is not read, whatever it holds (K11).
        hidden = ~np.any(seen, axis=-1)[..., None]
        Q, K, V, dO = (np.where(hidden, 0, x[cut]).astype(x.dtype) for x in (q, k, v, dout))
        term = np.where(hidden, 0, row_term[at][..., None]).astype(row_term.dtype)
        dS = P * (dO @ np.swapaxes(V, -1, -2) - term)
        dq[cut] = scale * (dS @ K)
        dk[cut] = scale * (np.swapaxes(dS, -1, -2) @ Q)
        dv[cut] = np.swapaxes(P, -1, -2) @ dO
    if variant == "roll":
        dq, dk, dv = (shift_heads(x, G, 1) for x in (dq, dk, dv))
    return dq, sum_groups(dk, kv_heads), sum_groups(dv, kv_heads)
