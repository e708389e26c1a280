"""Titans in chunks, for a memory of any depth: the clause S9 of `titans`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.titans_chunks import (
    Layers,
    check_memory_inputs,
    end_chunk,
    fold,
    read_chunk,
    reading,
)
from attnspec.reference.linear.titans_memory import memory_grad


def titans_chunk_mlp(
    W0: Any, S0: Any, k: np.ndarray, v: np.ndarray, q: np.ndarray, rates: Any, b: int, *,
    loss_scale: float = 2.0, read: str = "inclusive", valid: np.ndarray | None = None,
) -> tuple[np.ndarray, Layers, Layers]:  # fmt: skip
    """S9: as `titans_chunk_linear` for a memory of any depth; W0, S0, W and S are tuples of layers.

    >>> x, first = np.ones((1, 2, 1)), (np.ones((1, 1)), np.zeros((1, 1)))
    >>> titans_chunk_mlp(first, None, x, x, x, (0.5, 0.0, 0.0), 2)[0].ravel().round(4)
    array([0.7079, 1.4157])
    """
    W, S, tokens = check_memory_inputs(W0, S0, k, v, q, rates, b, loss_scale, read, valid)
    outputs = [np.zeros_like(v, shape=(*q.shape[:-2], 0, v.shape[-1]))]
    for _, chunk in tokens.chunks(b):
        of = chunk.coefficients()
        reads = reading(of, read, q.shape[-3] // k.shape[-3])
        H, Delta = memory_grad(W, chunk.k, chunk.v, loss_scale)
        Y = read_chunk(W, S, H, Delta, fold(chunk.q, k.shape[-3]), reads)
        outputs.append(Y.reshape(*chunk.q.shape[:-1], v.shape[-1]))
        W, S = end_chunk(W, S, H, Delta, of)
    return tokens.back(np.concatenate(outputs, axis=-2)), W, S
