"""The gradient of Titans with rates by chunk: the clauses S10 and S21 of `titans`.

From the last chunk to the first: what tokens have read there, the rule, and the inner gradient,
which belongs to the weights that were last renewed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import check_shaped
from attnspec.reference.linear.titans_chunks import check_states, fold
from attnspec.reference.linear.titans_gradients import (
    memory_grad_backward,
    mlp_memory_backward,
    sum_to,
    upstream,
)
from attnspec.reference.linear.titans_granular import titans_chunk_granular
from attnspec.reference.linear.titans_memory import memory_grad


def titans_chunk_granular_backward(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, theta: np.ndarray,
    eta: np.ndarray, alpha: np.ndarray, c: int, dy: np.ndarray, dW: Any = None, dS: Any = None,
    dpath: Any = None, batch_size: int | None = None, loss_scale: float = 2.0,
) -> tuple[Any, ...]:  # fmt: skip
    """S10, S21: dW0, dS0, dk, dv, dq, dtheta, deta, dalpha of `titans_chunk_granular`; dy, dW, dS
    and dpath are shaped as its outputs, None for those that are not used.

    >>> x, rate = np.ones((1, 2, 1)), np.zeros((1, 1))
    >>> titans_chunk_granular_backward((rate,), None, x, x, x, x[..., 0] / 4, rate, rate, 2, x)[3]
    array([[[0.5],
            [0.5]]])
    """
    y, *_, path = titans_chunk_granular(
        W0, S0, k, v, q, theta, eta, alpha, c, batch_size, loss_scale
    )
    check_shaped("dy", dy, y.shape)
    (first, momentum), T, chunks = check_states(W0, S0, k), k.shape[-2], k.shape[-2] // c
    weights = [tuple(layer[..., n, :, :] for layer in path) for n in range(chunks + 1)]
    bases = [0 if batch_size is None else n * c // batch_size * batch_size // c
             for n in range(chunks)]  # fmt: skip
    states, inner = [momentum], []
    for n in range(chunks):
        rows, carried = slice(n * c, (n + 1) * c), eta[..., n, None, None]
        H, Delta = memory_grad(weights[bases[n]], k[..., rows, :], v[..., rows, :], loss_scale)
        step = theta[..., rows, None]
        inner.append((rows, step, H, Delta))
        sums = [np.swapaxes(h, -1, -2) @ (step * e) for h, e in zip(H, Delta, strict=True)]
        states.append(tuple(carried * s - g for s, g in zip(states[n], sums, strict=True)))
    uW, uS = list(upstream("dW", dW, first)), list(upstream("dS", dS, first))
    base = [np.zeros_like(w) for w in first]
    dk, dv, dq, dtheta = (np.zeros_like(x) for x in (k, v, q, theta))
    deta, dalpha = np.zeros_like(eta), np.zeros_like(alpha)
    for n in reversed(range(chunks + 1)):
        rows = slice(max(n * c - 1, 0), min((n + 1) * c - 1, T))
        asked, above = (fold(x[..., rows, :], k.shape[-3]) for x in (q, dy))
        into, dasked = mlp_memory_backward(weights[n], asked, above)
        dq[..., rows, :] = dasked.reshape(q[..., rows, :].shape)
        uW = [u + x for u, x in zip(uW, into, strict=True)]
        if dpath is not None:
            uW = [u + x[..., n, :, :] for u, x in zip(uW, dpath, strict=True)]
        if n < chunks and bases[n] == n:
            uW, base = [u + x for u, x in zip(uW, base, strict=True)], [0 * x for x in base]
        if not n:
            break
        now, (before, step, H, Delta) = n - 1, inner[n - 1]
        carried, kept = eta[..., now, None, None], 1 - alpha[..., now, None, None]
        uS = [s + u for s, u in zip(uS, uW, strict=True)]
        dH, dDelta = [], []
        for i, (h, e) in enumerate(zip(H, Delta, strict=True)):
            deta[..., now] += np.einsum("...de,...de->...", states[now][i], uS[i])
            dalpha[..., now] -= np.einsum("...de,...de->...", weights[now][i], uW[i])
            dH.append(-((step * e) @ np.swapaxes(uS[i], -1, -2)))
            moved = -(h @ uS[i])
            dtheta[..., before] += np.einsum("...te,...te->...t", e, moved)
            dDelta.append(step * moved)
        more, dk[..., before, :], dv[..., before, :] = memory_grad_backward(
            weights[bases[now]], k[..., before, :], v[..., before, :], loss_scale, tuple(dH),
            tuple(dDelta),
        )  # fmt: skip
        base = [x + z for x, z in zip(base, more, strict=True)]
        uW, uS = [kept * u for u in uW], [carried * s for s in uS]
    return (
        tuple(sum_to(x, w) for x, w in zip(uW, W0, strict=True)),
        tuple(sum_to(x, s) for x, s in zip(uS, W0 if S0 is None else S0, strict=True)),
        dk, dv, dq, dtheta, deta, dalpha,
    )  # fmt: skip
