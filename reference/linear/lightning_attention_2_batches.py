"""Lightning Attention-2 over batches of unequal sequences: the clause S10.

Packed sequences lie end to end and start each from a state of their own; padded sequences mark
their real tokens, and a padded one neither writes nor ages the state. Both are the block form
applied to the real tokens, so their results are those of each sequence alone.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_offsets,
    check_shaped,
    check_size,
)
from attnspec.reference.linear.lightning_attention_2_chunks import (
    backward_chunk,
    chunk_output,
    chunk_states,
    constant_log_decays,
)


def attend_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    offsets: np.ndarray,
    S0: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """S10: attention inside each of the sequences laid end to end.

    q (..., heads, total, d), k (..., kv_heads, total, d), v (..., kv_heads, total, e), s (heads,);
    offsets int (sequences + 1), increasing from 0 to the total; S0 (..., sequences, heads, d, e).
    Returns o (..., heads, total, e) and the last states S (..., sequences, heads, d, e).

    >>> x = np.ones((1, 3, 1))
    >>> o, S = attend_packed(x, x, x, np.zeros(1), np.array([0, 1, 3]))
    >>> o.ravel(), S.ravel()
    (array([1., 1., 2.]), array([1., 2.]))
    """
    g, sequences = _check_packed(q, k, v, s, offsets, S0)
    outputs, states = [], []
    for n, rows in enumerate(sequences):
        Q, K, V = (x[..., rows, :] for x in (q, k, v))
        S_entering, S = chunk_states(K, V, g[..., rows], block, _entry(S0, n))
        outputs.append(chunk_output(Q, K, V, g[..., rows], S_entering, block))
        states.append(S)
    return np.concatenate(outputs, axis=-2), np.stack(states, axis=-4)


def attend_packed_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    offsets: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S6, S7, S10: dq, dk, dv, ds (heads,), dS0 (..., sequences, heads, d, e).

    >>> x = np.ones((1, 3, 1))
    >>> attend_packed_backward(x, x, x, np.zeros(1), np.array([0, 1, 3]), None, x)[2].ravel()
    array([1., 2., 1.])
    """
    g, sequences = _check_packed(q, k, v, s, offsets, S0)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    if dS is not None:
        check_shaped("dS", dS, _states_shape(q, v, offsets))
    parts = []
    for n, rows in enumerate(sequences):
        Q, K, V, dO = (x[..., rows, :] for x in (q, k, v, do))
        first, last = _entry(S0, n), _entry(dS, n)
        parts.append(backward_chunk(Q, K, V, g[..., rows], dO, last, block, first))
    dq, dk, dv, dg, dS0 = zip(*parts, strict=True)
    by_token = [np.concatenate(rows, axis=-2) for rows in (dq, dk, dv)]
    ds = -np.sum(np.concatenate(dg, axis=-1), axis=(*range(g.ndim - 2), -1))
    return by_token[0], by_token[1], by_token[2], ds, np.stack(dS0, axis=-4)


def attend_padded(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    valid: np.ndarray,
    S0: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """S10: o (..., heads, T, e) and S (..., heads, d, e) as if the padded tokens were cut out.

    T rows in each of q, k and v; `valid` bool (..., T), their leading axes without heads, is True
    at real tokens. What is stored at a padded token is not read (K11); its output is 0.

    >>> x = np.array([[[1.0], [np.nan], [1.0]]])
    >>> o, S = attend_padded(x, x, x, np.array([np.log(2.0)]), np.array([True, False, True]))
    >>> o.ravel(), S.ravel()
    (array([1. , 0. , 1.5]), array([1.5]))
    """
    keys, values, g, real = _check_padded(q, k, v, s, valid)
    S_entering, S = chunk_states(keys, values, g, block, S0)
    o = chunk_output(q, keys, values, g, S_entering, block)
    return np.where(real, o, np.zeros_like(o)), S


def attend_padded_backward(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    valid: np.ndarray,
    S0: np.ndarray | None,
    do: np.ndarray,
    dS: np.ndarray | None = None,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """S6, S7, S10: dq, dk, dv, which are 0 at padded tokens, ds (heads,) and dS0.

    >>> x = np.ones((1, 3, 1))
    >>> attend_padded_backward(x, x, x, np.zeros(1), np.array([True, False, True]), None, x)[2]
    array([[[2.],
            [0.],
            [1.]]])
    """
    keys, values, g, real = _check_padded(q, k, v, s, valid)
    check_shaped("do", do, (*q.shape[:-1], v.shape[-1]))
    if dS is not None:
        check_shaped("dS", dS, (*q.shape[:-2], q.shape[-1], v.shape[-1]))
    queries, upstream = (np.where(real, x, np.zeros_like(x)) for x in (q, do))
    dq, dk, dv, dg, dS0 = backward_chunk(queries, keys, values, g, upstream, dS, block, S0)
    ds = -np.sum(np.where(real[..., 0], dg, np.zeros_like(dg)), axis=(*range(dg.ndim - 2), -1))
    by_token = [np.where(real, x, np.zeros_like(x)) for x in (dq, dk, dv)]
    return by_token[0], by_token[1], by_token[2], ds, dS0


def _entry(states: np.ndarray | None, n: int) -> np.ndarray | None:
    return None if states is None else states[..., n, :, :, :]


def _states_shape(q: np.ndarray, v: np.ndarray, offsets: np.ndarray) -> tuple[int, ...]:
    return (*q.shape[:-3], len(offsets) - 1, q.shape[-3], q.shape[-1], v.shape[-1])


def _check_packed(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    s: np.ndarray,
    offsets: np.ndarray,
    S0: np.ndarray | None,
) -> tuple[np.ndarray, list[slice]]:
    """K14, S3: the log decays (..., heads, total) and the rows of each sequence, once the arguments
    fit one another.
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    sequences = check_offsets("offsets", offsets, q.shape[-2])
    if S0 is not None:
        check_shaped("S0", S0, _states_shape(q, v, offsets))
    return constant_log_decays(q, s), sequences


def _check_padded(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, s: np.ndarray, valid: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """K14, S10: k, v and log decays (..., heads, T), each 0 at padded tokens, and where tokens are
    real, bool (..., 1, T, 1), once the arguments fit one another.
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    check_array("valid", valid, ("tokens",), dtype="bool")
    expected = (*q.shape[:-3], q.shape[-2])
    if valid.shape != expected:
        raise ValueError(f"valid: got shape {valid.shape}, expected {expected}")
    g = constant_log_decays(q, s)
    real = valid[..., None, :, None]
    keys, values = (np.where(real, x, np.zeros_like(x)) for x in (k, v))
    return keys, values, np.where(real[..., 0], g, np.zeros_like(g)), real
