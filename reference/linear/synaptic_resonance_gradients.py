"""Synaptic Resonance, the gradient: clause S12 of `synaptic_resonance`, step by step.

Each step is walked back from its last token, with the gradient of what is carried forward, the
trace or the memory, carried backward.
"""

from __future__ import annotations

import numpy as np

from attnspec.reference.conventions import check_array, check_shaped, repeat_heads
from attnspec.reference.dense.attention_gradient import sum_groups
from attnspec.reference.linear.synaptic_resonance_memory import (
    FLOOR,
    check_keys,
    check_memory,
    first_state,
    norm_of,
    repeat_rows,
    stack,
    unit,
)


def unit_backward(x: np.ndarray, dunit: np.ndarray) -> np.ndarray:
    """S12: dx of `unit` from the gradient of its output, both (..., d).

    >>> unit_backward(np.array([0.0, 2.0]), np.array([1.0, 1.0]))
    array([0.5, 0. ])
    """
    check_array("x", x, ("d",))
    check_shaped("dunit", dunit, x.shape)
    norm = norm_of(x)
    along = np.where(norm > FLOOR, np.sum(dunit * unit(x), axis=-1), 0.0).astype(x.dtype)
    return (dunit - along[..., None] * unit(x)) / np.maximum(norm, FLOOR)[..., None]


def relevance_backward(
    k: np.ndarray, mu: float, valid: np.ndarray | None, c0: np.ndarray | None, drho: np.ndarray,
    dc: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """S12: dk (..., kv_heads, T, d) and dc0 (..., kv_heads, d) of `relevance`.

    drho (..., kv_heads, T) and dc (..., kv_heads, d) are the gradients of its two outputs.

    >>> one = np.ones((1, 1))
    >>> dk, dc0 = relevance_backward(one[None], 0.5, None, one, one)
    >>> dk.ravel(), dc0.ravel()
    (array([0.]), array([0.]))
    """
    keys, real = check_keys(k, mu, valid)
    c = first_state("c0", c0, (*k.shape[:-2], k.shape[-1]), k)
    check_shaped("drho", drho, k.shape[:-1])
    dc = first_state("dc", dc, c.shape, k)
    kh = unit(keys)
    before = []
    for t in range(k.shape[-2]):
        before.append(c)
        c = np.where(real[..., t, None], mu * c + (1 - mu) * kh[..., t, :], c)
    rows = []
    for t in reversed(range(k.shape[-2])):
        c, now, norm = before[t], kh[..., t, :], norm_of(before[t])[..., None]
        length = np.maximum(norm, FLOOR)
        dot = np.sum(now * c, axis=-1)[..., None]
        g = np.where((dot > 0) & real[..., t, None], drho[..., t, None], 0.0).astype(k.dtype)
        inward = np.where(norm > FLOOR, dot * c / length**2, 0.0).astype(k.dtype)
        old = real[..., t, None]
        rows.append(np.where(old, (1 - mu) * dc + g * c / length, np.zeros_like(c)))
        dc = np.where(old, mu * dc + g * (now - inward) / length, dc)
    return unit_backward(keys, stack(rows[::-1], np.zeros_like(k), -2)), dc


def memory_backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, rho: np.ndarray, eta: float, lam: float,
    S0: np.ndarray | None, valid: np.ndarray | None, dm: np.ndarray, dS: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """S12: dq, dk, dv, drho, dS0 of `memory_recurrent`, shaped as the arguments.

    dm (..., heads, T, dv) and dS (..., kv_heads, d, dv) are the gradients of its two outputs.

    >>> x, rho = np.ones((1, 2, 1)), np.ones((1, 2))
    >>> [g.ravel() for g in memory_backward(x, x, x, rho, 1.0, 0.5, None, None, x)[2:]]
    [array([1., 0.]), array([1., 0.]), array([1.5])]
    """
    qh, kh, v, rho, real, S = check_memory(q, k, v, rho, eta, lam, S0, valid)
    check_shaped("dm", dm, (*q.shape[:-1], v.shape[-1]))
    dS = first_state("dS", dS, S.shape, q)
    heads, kv_heads = q.shape[-3], k.shape[-3]
    seen = repeat_rows(real, heads)
    dm = np.where(seen[..., None], dm, np.zeros_like(dm))
    dqh, dkh, dv, drho = (np.zeros_like(x) for x in (q, k, v, rho))
    gates = eta * rho
    before = []
    for t in range(q.shape[-2]):
        before.append(S)
        written = (gates[..., t, None] * kh[..., t, :])[..., None] * v[..., t, None, :]
        S = np.where(real[..., t, None, None], lam * S + written, S)
    for t in reversed(range(q.shape[-2])):
        now = slice(t, t + 1)
        one, gate = real[..., now, None], gates[..., now, None]
        learned = v[..., now, :] @ np.swapaxes(dS, -1, -2)
        dkh[..., now, :] = np.where(one, gate * learned, 0.0)
        dv[..., now, :] = np.where(one, gate * (kh[..., now, :] @ dS), 0.0)
        drho[..., now] = np.where(
            one[..., 0], eta * np.sum(learned * kh[..., now, :], axis=-1), 0.0
        )
        dqh[..., now, :] = dm[..., now, :] @ np.swapaxes(repeat_heads(before[t], heads), -1, -2)
        asked = sum_groups(np.swapaxes(qh[..., now, :], -1, -2) @ dm[..., now, :], kv_heads)
        dS = np.where(one, lam * dS + asked, dS)
    hidden = real[..., None]
    dq = unit_backward(np.where(seen[..., None], q, np.zeros_like(q)), dqh)
    dk = unit_backward(np.where(hidden, k, np.zeros_like(k)), dkh)
    return dq, dk, dv, drho, dS
