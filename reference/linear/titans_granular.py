"""Titans with rates by chunk: the clause S10 of `titans`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.conventions import (
    check_array,
    check_attention_inputs,
    check_integer,
    check_size,
)
from attnspec.reference.linear.titans_chunks import Layers, check_states, fold
from attnspec.reference.linear.titans_coefficients import check_rates
from attnspec.reference.linear.titans_memory import check_scale, memory_grad, mlp_memory


def titans_chunk_granular(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, theta: np.ndarray,
    eta: np.ndarray, alpha: np.ndarray, c: int, batch_size: int | None = None,
    loss_scale: float = 2.0,
) -> tuple[np.ndarray, Layers, Layers, Layers]:  # fmt: skip
    """S10: y (..., heads, T, dv), the last W and S, and the path of the weights.

    Arrays as those of `titans_chunk_mlp`; theta (..., kv_heads, T), eta and alpha (..., kv_heads,
    T // c), one for each complete chunk; `batch_size` is a multiple of c, None for never. The path
    holds for every layer the weights (..., kv_heads, T // c + 1, inputs, outputs) before the first
    chunk and behind each.

    >>> x, rate = np.ones((1, 3, 1)), np.zeros((1, 1))
    >>> y, *_ = titans_chunk_granular((rate,), None, x, x, x, x[..., 0] / 4, rate, rate, 2)
    >>> y.ravel()
    array([0., 1., 1.])
    """
    check_attention_inputs(q, k, v)
    check_size("q", q.shape[-2], k.shape[-2], "tokens, as in k")
    W, S = check_states(W0, S0, k)
    check_size("v", v.shape[-1], W[-1].shape[-1], "dv, the width of the last layer of W0")
    check_integer("c", c, least=1)
    check_scale(loss_scale)
    _check_period(batch_size, c)
    T, kv_heads = k.shape[-2], k.shape[-3]
    _check_rates(theta, eta, alpha, k, T // c)
    base, paths = W, [W]
    for chunk in range(T // c):
        rows = slice(chunk * c, (chunk + 1) * c)
        if batch_size is not None and chunk * c % batch_size == 0:
            base = W
        H, Delta = memory_grad(base, k[..., rows, :], v[..., rows, :], loss_scale)
        sums = [np.swapaxes(h, -1, -2) @ (theta[..., rows, None] * e)
                for h, e in zip(H, Delta, strict=True)]  # fmt: skip
        carried, kept = eta[..., chunk, None, None], 1 - alpha[..., chunk, None, None]
        S = tuple(carried * s - g for s, g in zip(S, sums, strict=True))
        W = tuple(kept * w + s for w, s in zip(W, S, strict=True))
        paths.append(W)
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for chunk, weights in enumerate(paths):
        rows = slice(max(chunk * c - 1, 0), min((chunk + 1) * c - 1, T))
        y = mlp_memory(weights, fold(q[..., rows, :], kv_heads))
        outputs.append(y.reshape(*q[..., rows, 0].shape, v.shape[-1]))
    path = tuple(np.stack(layer, axis=-3) for layer in zip(*paths, strict=True))
    return np.concatenate(outputs, axis=-2), W, S, path


def _check_period(batch_size: Any, c: int) -> None:
    if batch_size is None:
        return
    check_integer("batch_size", batch_size, least=1)
    if batch_size % c:
        raise ValueError(f"batch_size: got {batch_size}, expected a multiple of {c} (c)")


def _check_rates(
    theta: np.ndarray, eta: np.ndarray, alpha: np.ndarray, k: np.ndarray, chunks: int
) -> None:
    for name, x, tokens in (
        ("theta", theta, k.shape[-2]),
        ("eta", eta, chunks),
        ("alpha", alpha, chunks),
    ):
        check_array(name, x, ("kv_heads", "T"))
        if x.shape != (*k.shape[:-2], tokens):
            raise ValueError(f"{name}: got shape {x.shape}, expected {(*k.shape[:-2], tokens)}")
        if x.dtype != k.dtype:
            raise TypeError(f"{name}: got dtype {x.dtype}, expected {k.dtype}, as k")
    check_rates(theta, 0 * theta, 0 * theta)
    check_rates(0 * eta, eta, alpha)
