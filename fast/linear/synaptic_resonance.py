"""Synaptic Resonance (reconstruction) on the scan and flash engines.

The memory is a scan with a constant decay, its trace another one over the keys, and the softmax, to
which it is added, is plain flash attention, with a window if wished. On Triton the three are one
operation. Nothing here is the paper's: see the chapter. S and c come back in float32. With padding
and a window together, tokens are gathered so that the window counts real ones only; nothing waits
for the GPU.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from attnspec.fast.backend import choose_by_dtype
from attnspec.fast.engines.scan import MEMORY, use_config
from attnspec.fast.linear.lightning_attention_2_chunks import as_state
from attnspec.fast.linear.synaptic_resonance_batches import synaptic_resonance_packed
from attnspec.fast.linear.synaptic_resonance_decode import (
    State,
    check_softmax,
    init_state,
    step,
)
from attnspec.fast.linear.synaptic_resonance_memory import (
    blank,
    check_memory,
    check_number,
    memory_chunked,
    memory_recurrent,
    relevance,
    remember,
    resonate,
)
from attnspec.fast.linear.synaptic_resonance_whole import attend_real, resonance

__all__ = [
    "State",
    "init_state",
    "memory_chunked",
    "memory_recurrent",
    "relevance",
    "step",
    "synaptic_resonance",
    "synaptic_resonance_packed",
]

CLAIMS = {
    "relevance": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "memory_recurrent": {"gradient": True},
    "memory_chunked": {
        "compiled": True,
        "triton": {
            "graph": True,
            "configs": {str(c): functools.partial(use_config, c) for c in MEMORY},
        },
    },
    "synaptic_resonance": {
        "gradient": True,
        "compiled": True,
        "blocks": (16, 32, 128),
        "triton": {"graph": True},
    },
    "synaptic_resonance_packed": {
        "gradient": True,
        "compiled": True,
        "blocks": (16, 32, 128),
        "triton": {"graph": True},
    },
}
"""What the suite is told beyond the defaults."""


def synaptic_resonance(
    q: Tensor, k: Tensor, v: Tensor, S0: Tensor | None = None, c0: Tensor | None = None, *,
    eta: float = 0.1, lam: float = 0.99, mu: float = 0.9, beta: float = 0.5,
    window: int | None = None, valid: Tensor | None = None, backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:  # fmt: skip
    """y (batch, heads, T, dv), and the state: S (batch, kv_heads, d, dv), c (batch, kv_heads, d).

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv); S0 and c0 are a
    state, in any float dtype; `valid` bool (batch, T), True at real tokens. d and dv up to 256.
    Differentiable in q, k, v, S0 and c0.
    """
    check_memory(q, k, v, eta, lam, valid)
    check_number("mu", mu, 0.0, 1.0, below=True)
    check_softmax(beta, window)
    S0 = as_state("S0", S0, (*k.shape[:2], k.shape[3], v.shape[3]), k)
    c0 = as_state("c0", c0, (*k.shape[:2], k.shape[3]), k)
    q, k, v = (blank(x, valid) for x in (q, k, v))
    if choose_by_dtype(backend, "q", q) == "triton":
        numbers: dict[str, Any] = {"eta": eta, "lam": lam, "mu": mu, "beta": beta}
        return resonance(q, k, v, S0, c0, valid, **numbers, window=window)
    rho, c = resonate(k, mu, valid, c0, backend)
    o, _ = attend_real(q, k, v, valid, window, backend)
    y, S = remember(q, k, v, rho, eta, lam, S0, valid, backend, onto=o, share=beta)
    return y, (S, c)
