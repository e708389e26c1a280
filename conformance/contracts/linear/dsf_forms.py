"""Attention and SSD of `dsf` as chunks compute them: see `Contract.form`."""

from __future__ import annotations

from typing import Any

import numpy as np

from attnspec.reference.linear.dsf_mixers import (
    check_pair,
    check_state,
    feature_map,
    linear_attention,
    normalised_attention,
)
from attnspec.reference.linear.dsf_ssm import ssd_as_attention


def last_state(
    k: np.ndarray, v: np.ndarray, h0: np.ndarray | None, log_decay: np.ndarray | None = None
) -> np.ndarray:
    """The last h as a chunk gives it: keys are scaled by what is left of them, then summed."""
    if log_decay is None:
        h = np.swapaxes(v, -1, -2) @ k
        return h if h0 is None else h0 + h
    total = np.cumsum(log_decay, axis=-1)
    left = np.exp(total[..., -1:] - total) if total.shape[-1] else np.exp(total)
    h = np.swapaxes(v, -1, -2) @ (left[..., None] * k)
    if h0 is None:
        return h
    return np.exp(np.sum(log_decay, axis=-1))[..., None, None] * h0 + h


def linear_in_chunks(q: Any, k: Any, v: Any, state: Any = None) -> Any:
    y, _ = linear_attention(q, k, v, state)
    h0, z0 = check_pair(state, q, v)
    psi = feature_map(k)
    z = last_state(psi, np.ones_like(v[..., :1]), z0[..., None, :])
    return y, (last_state(psi, v, h0), z[..., 0, :])


def normalised_in_chunks(q: Any, k: Any, v: Any, n: Any, h0: Any = None) -> Any:
    return normalised_attention(q, k, v, n, h0)[0], last_state(k, v, check_state(h0, q, v))


def ssd_in_chunks(Delta: Any, a: Any, b: Any, c: Any, u: Any, h0: Any = None) -> Any:
    """What is left of a key at a query is a difference of two sums of log decays."""
    q, k, v, log_decay = ssd_as_attention(Delta, a, b, c, u)
    total = np.cumsum(log_decay, axis=-1)
    tokens = np.arange(total.shape[-1])
    between = total[..., :, None] - total[..., None, :]
    left = np.exp(np.where(tokens[:, None] >= tokens, between, -np.inf))
    y = (left * (q @ np.swapaxes(k, -1, -2))) @ v
    if h0 is not None:
        y = y + np.exp(total)[..., None] * (q @ np.swapaxes(h0, -1, -2))
    return y, last_state(k, v, h0, log_decay)
