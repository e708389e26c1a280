"""LightNet's operations as chunks compute them: see `Contract.form`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from attnspec.reference.conventions import repeat_heads
from attnspec.reference.linear.lightnet import lightnet_causal
from attnspec.reference.linear.lightnet_gradient import check_state
from attnspec.reference.linear.lightnet_scan import additive_gates, vector_decay_attend


def chunk_state(kbar: np.ndarray, v: np.ndarray, log_decay: np.ndarray, S0: Any) -> np.ndarray:
    """The last state as a chunk gives it: keys are scaled by what is left of them, then summed."""
    left = np.ones_like(np.sum(kbar, axis=-2))
    scaled = np.zeros_like(kbar)
    for t in reversed(range(kbar.shape[-2])):
        scaled[..., t, :] = left * kbar[..., t, :]
        left = left * np.exp(log_decay[..., t, :])
    S = np.swapaxes(scaled, -1, -2) @ v
    return S if S0 is None else left[..., None] * S0 + S


def decay_in_chunks(
    q: np.ndarray, kbar: np.ndarray, v: np.ndarray, log_decay: np.ndarray, S0: Any = None,
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    o, _ = vector_decay_attend(q, kbar, v, log_decay, S0, scale=scale)
    return o, chunk_state(kbar, v, log_decay, S0)


def causal_in_chunks(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
    o, (_, z) = lightnet_causal(q, k, v, **options)
    S0, z0 = check_state(options.get("state"), q, k, v)
    heads = q.shape[-3]
    keys, values = repeat_heads(k, heads), repeat_heads(v, heads)
    kbar, log_decay, _ = additive_gates(keys, z0)
    return o, (chunk_state(kbar, values, log_decay, S0), z)


def decay_in_sequences(
    q: np.ndarray, kbar: np.ndarray, v: np.ndarray, log_decay: np.ndarray, offsets: np.ndarray,
    S0: Any = None, scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    parts = []
    for n, (first, last) in enumerate(pairwise(offsets)):
        Q, K, V, g = (x[:, first:last] for x in (q, kbar, v, log_decay))
        parts.append(decay_in_chunks(Q, K, V, g, None if S0 is None else S0[n], scale))
    o, S = zip(*parts, strict=True)
    return np.concatenate(o, axis=1), np.stack(S)


def causal_in_sequences(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, offsets: np.ndarray, state: Any = None,
    **options: Any,
) -> Any:  # fmt: skip
    o, states = [], []
    for n, (first, last) in enumerate(pairwise(offsets)):
        rows = (x[:, first:last] for x in (q, k, v))
        before = None if state is None else (state[0][n], state[1][n])
        out, after = causal_in_chunks(*rows, state=before, **options)
        o.append(out)
        states.append(after)
    S, z = zip(*states, strict=True)
    return np.concatenate(o, axis=1), (np.stack(S), np.stack(z))
