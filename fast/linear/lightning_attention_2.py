"""Lightning Attention-2 on Numba and Triton: every form of it is a plan for the scan engine.

The quadratic, the recurrent and the blocked form of the chapter are one computation here, linear in
the tokens, with the state in float32; `attend`, `attend_packed` and `attend_padded` are
differentiable in q, k, v, s and S0. Values of s, g and offsets are checked on the CPU only: on a
GPU the check would stall it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_integer,
    check_size,
    wide_dtype,
)
from attnspec.fast.engines.scan import CANDIDATES, scan, scan_backward, step, use_config
from attnspec.fast.linear.lightning_attention_2_batches import (
    attend_packed,
    attend_packed_backward,
    attend_padded,
    attend_padded_backward,
)
from attnspec.fast.linear.lightning_attention_2_chunks import (
    as_state,
    backward_chunk,
    check_slopes,
    check_upstream,
    chunk_output,
    chunk_states,
)

__all__ = [
    "attend",
    "attend_backward",
    "attend_left",
    "attend_packed",
    "attend_packed_backward",
    "attend_padded",
    "attend_padded_backward",
    "attend_recurrent",
    "backward_chunk",
    "backward_left",
    "chunk_output",
    "chunk_states",
    "decay_mask",
    "decode_step",
    "layer_slopes",
    "slopes",
]

CLAIMS = {
    **{name: {"launches": None} for name in ("slopes", "layer_slopes", "decay_mask")},
    "attend": {
        "gradient": True,
        "compiled": True,
        "triton": {
            "graph": True,
            "configs": {str(c): functools.partial(use_config, c) for c in CANDIDATES},
        },
    },
    "attend_packed": {"gradient": True, "compiled": True},
    "attend_padded": {"gradient": True},
    "attend_left": {"gradient": True},
    "decode_step": {"compiled": True, "triton": {"graph": True}},
}
"""What the suite is told beyond the defaults; the first three are arithmetic on slopes."""


def slopes(n_heads: int) -> Tensor:
    """Slopes (n_heads,) of the heads of one layer, float64 on the CPU."""
    check_integer("n_heads", n_heads, least=1)
    power = 1 << (n_heads.bit_length() - 1)
    even = 2.0 ** (-8.0 * torch.arange(1, power + 1, dtype=torch.float64) / power)
    if power == n_heads:
        return even
    return torch.cat([even, slopes(2 * power)[0::2][: n_heads - power]])


def layer_slopes(n_heads: int, layer: int, n_layers: int) -> Tensor:
    """Slopes (n_heads,) of layer `layer` = 0 .. n_layers - 1, float64 on the CPU."""
    check_integer("n_layers", n_layers, least=1)
    check_integer("layer", layer, least=0)
    if layer >= n_layers:
        raise ValueError(f"layer: got {layer}, expected an integer below {n_layers} (n_layers)")
    return slopes(n_heads) * (1 - layer / max(n_layers - 1, 1) + 1e-5)


def decay_mask(T: int, s: Tensor) -> Tensor:
    """M (heads, T, T) of slopes s (heads,), in the dtype of s; formed in float32 or wider."""
    check_integer("T", T, least=0)
    check_slopes(s)
    wide = s.to(wide_dtype(s))
    place = torch.arange(T, device=s.device)
    distance = (place[:, None] - place).to(wide.dtype)
    gap = torch.where(distance >= 0, -wide[:, None, None] * distance, -torch.inf)
    return gap.exp().to(s.dtype)


def attend_left(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, *, backend: str | None = None
) -> Tensor:
    """o (batch, heads, T, e) of the quadratic form, computed in time linear in T.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, e), s (heads,).
    """
    _check_self(q, k, v, s)
    return scan(q, k, v, slopes=s, backend=backend)[0]


def backward_left(
    q: Tensor, k: Tensor, v: Tensor, s: Tensor, do: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend_left`; do (batch, heads, T, e)."""
    _check_self(q, k, v, s)
    check_upstream("do", do, (*q.shape[:3], v.shape[3]), q)
    return scan_backward(q, k, v, do, slopes=s, backend=backend)[:3]


def attend_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    S0: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, T, e) and the last state S, float32 (batch, heads, d, e), as `attend`.

    S0 (batch, heads, d, e) is the state before the first token, in any float dtype.
    """
    _check_self(q, k, v, s)
    S0 = as_state("S0", S0, _state_shape(q, v), q)
    return scan(q, k, v, slopes=s, state=S0, backend=backend)


def decode_step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, s: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, 1, e) of one new token, and a new state, float32 (batch, heads, d, e).

    S (batch, heads, d, e), q (batch, heads, 1, d), k (batch, kv_heads, 1, d), v (batch, kv_heads,
    1, e). One kernel; nothing waits for the GPU.
    """
    _check_self(q, k, v, s)
    check_size("q", q.shape[2], 1, "one token")
    state = as_state("S", S, _state_shape(q, v), q)
    if state is None:
        raise TypeError("S: got NoneType, expected torch.Tensor")
    return step(state, q, k, v, slopes=s, backend=backend)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    S0: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """o (batch, heads, q_tokens, e) and the last state S, float32 (batch, heads, d, e).

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    e), s (heads,), S0 (batch, heads, d, e) in any float dtype. Of unequal lengths the shorter is
    copied behind zeros. The result does not depend on `block`, which is a hint for the kernels.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_slopes(s, q.shape[1])
    check_integer("block", block, least=1)
    S0 = as_state("S0", S0, _state_shape(q, v), q)
    T = max(q.shape[2], k.shape[2])
    Q, K, V = (_behind_zeros(x, T) for x in (q, k, v))
    o, S = scan(Q, K, V, slopes=s, state=S0, block=block, backend=backend)
    return o[:, :, T - q.shape[2] :], S


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    S0: Tensor | None,
    do: Tensor,
    dS: Tensor | None = None,
    *,
    block: int = 64,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, ds (heads,), dS0 of `attend`; do and dS are shaped as its outputs."""
    check_attention_inputs(q, k, v, FLOATS)
    check_slopes(s, q.shape[1])
    check_integer("block", block, least=1)
    check_upstream("do", do, (*q.shape[:3], v.shape[3]), q)
    shape = _state_shape(q, v)
    first, last = as_state("S0", S0, shape, q), as_state("dS", dS, shape, q)
    T = max(q.shape[2], k.shape[2])
    Q, K, V, dO = (_behind_zeros(x, T) for x in (q, k, v, do))
    dq, dk, dv, ds, dS0 = scan_backward(
        Q, K, V, dO, last, slopes=s, state=first, block=block, backend=backend
    )
    q_from, k_from = T - q.shape[2], T - k.shape[2]
    return dq[:, :, q_from:], dk[:, :, k_from:], dv[:, :, k_from:], ds, dS0


def _behind_zeros(x: Tensor, T: int) -> Tensor:
    """x (batch, heads, tokens, width) made T tokens long by zeros in front."""
    missing = T - x.shape[2]
    return pad(x, (0, 0, missing, 0)) if missing else x


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return (*q.shape[:2], q.shape[3], v.shape[3])


def _check_self(q: Any, k: Any, v: Any, s: Any) -> None:
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], k.shape[2], "tokens, as in k")
    check_slopes(s, q.shape[1])
