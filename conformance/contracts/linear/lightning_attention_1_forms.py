"""TransNormerLLM's layers as fast kernels compute them: in chunks, with results kept in between.

What one step hands to the next is stored in the inputs' type, once. Where the next step is a
product, rounded runs round its operand already; elsewhere a product with the identity says so.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from attnspec.reference.linear.lightning_attention_1 import decay_attend_tiled, srms_norm
from attnspec.reference.linear.lightning_attention_1_layers import gated_norm, project
from attnspec.reference.linear.lightning_attention_1_rows import lrpe
from attnspec.reference.linear.lightning_attention_2_batches import attend_padded
from attnspec.reference.primitives.sigmoid import silu


def stored(x: np.ndarray) -> np.ndarray:
    """x, and in a rounded run x as an array of the inputs' type holds it."""
    return x @ np.eye(x.shape[-1])


def gla(
    x: Any, params: Any, state: Any = None, offset: int = 0, *, v_activation: bool = False,
    gate: str = "linear", norm: str = "srms", eps: float = 1e-6, valid: Any = None,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    slopes = params["slopes"]
    heads = project(x, params["Wqkvu"], slopes.shape[0])
    q, k, u = (stored(part) for part in (heads.q, heads.k, heads.u))
    q, k = silu(q), silu(k)
    v = silu(stored(heads.v)) if v_activation else heads.v
    if params["theta"] is not None:
        q, k = lrpe(q, params["theta"], offset), lrpe(k, params["theta"], offset)
    if valid is None:
        o, last = decay_attend_tiled(q, k, v, slopes, 64, state)
    else:
        o, last = attend_padded(q, k, v, slopes, valid, state)
    return gated_norm(stored(o), u, gate=gate, norm=norm, eps=eps) @ params["Wo"], last


def packed(
    x: Any, params: Any, offsets: Any, states: Any = None, starts: Any = None, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    parts = [
        gla(
            x[first:last],
            params,
            None if states is None else states[n],
            0 if starts is None else int(starts[n]),
            **options,
        )
        for n, (first, last) in enumerate(itertools.pairwise(offsets))
    ]
    return np.concatenate([y for y, _ in parts]), np.stack([state for _, state in parts])


def padded(
    x: Any, params: Any, valid: Any, state: Any = None, offset: int = 0, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    real = valid[..., None]
    x = np.where(real, x, np.zeros_like(x))
    y, last = gla(x, params, state, offset, valid=valid, **options)
    return np.where(real, y, np.zeros_like(y)), last


def block(
    x: Any, params: Any, state: Any = None, offset: int = 0, *, eps: float = 1e-6, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    mixed, last = gla(srms_norm(x, eps), params, state, offset, eps=eps, **options)
    x = stored(x + stored(mixed))
    rows = srms_norm(x, eps)
    channels = stored(rows @ params["Wv"]) * stored(rows @ params["Wu"])
    return x + stored(channels @ params["Wd"]), last
