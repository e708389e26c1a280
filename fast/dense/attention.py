"""Dense softmax attention on the flash and decode engines: exact, memory linear in the context."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_scale,
    check_size,
    check_tensor,
)
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash, mask_options
from attnspec.fast.growing import Room, append, check_continues

CLAIMS = {
    "attend": {
        "gradient": True,
        "blocks": (16, 64, 128),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
    "attend_packed": {
        "gradient": True,
        "blocks": (16, 64, 128),
        "compiled": True,
        "triton": {"configs": SPECIALISED_CONFIGS},
    },
}
MOST_DECODED = 16
"""The longest step that the decode engine serves; longer ones fill the flash engine's tiles."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, q_tokens, dv) and lse (batch, heads, q_tokens), float32.

    q (batch, heads, q_tokens, d), k (batch, kv_heads, k_tokens, d), v (batch, kv_heads, k_tokens,
    dv); `causal` is aligned at the bottom right (K3), `mask` bool and broadcastable to the scores,
    True = visible. A padding mask (batch, 1, 1, k_tokens) costs about as little as none. Rows that
    see nothing have output 0 and lse -inf (K4). Differentiable.
    """
    return flash(q, k, v, causal=causal, scale=scale, backend=backend, **mask_options(k, mask))


def attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside each of the sequences laid end to end.

    q (heads, q_total, d), k (kv_heads, k_total, d), v (kv_heads, k_total, dv); offsets int
    (sequences + 1), increasing from 0 to the total, which is checked on CPU tensors only: a check
    on a CUDA device would wait for it. Returns out (heads, q_total, dv) and lse (heads, q_total).
    """
    for name, x, axes in (
        ("q", q, ("heads", "q_total", "d")),
        ("k", k, ("kv_heads", "k_total", "d")),
        ("v", v, ("kv_heads", "k_total", "dv")),
    ):
        check_tensor(name, x, axes, FLOATS)
    out, lse = flash(
        q[None],
        k[None],
        v[None],
        causal=causal,
        offsets=(q_offsets, k_offsets),
        scale=scale,
        backend=backend,
    )
    return out[0], lse[0]


class State(NamedTuple):
    """The keys (batch, kv_heads, tokens, d) and values (batch, kv_heads, tokens, dv) so far.

    A step writes its tokens **in place** into the spare `room` behind them and returns a new state;
    the old one still sees its own tokens.
    """

    k: Tensor
    v: Tensor
    room: Room | None = None


def init_state(k: Tensor, v: Tensor, *, backend: str | None = None) -> State:
    """An empty state for tokens shaped as `k` and `v`."""
    check_tensor("k", k, ("batch", "kv_heads", "tokens", "d"), FLOATS)
    check_tensor("v", v, ("batch", "kv_heads", "tokens", "dv"), FLOATS)
    return State(k[:, :, :0], v[:, :, :0])


def step(
    state: State,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs of one or more new tokens, and the state that includes them (see `State`).

    q (batch, heads, tokens, d), k (batch, kv_heads, tokens, d), v (batch, kv_heads, tokens, dv).
    For inference: there is no gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_scale(scale)
    check_continues(state, k, v)
    room = getattr(state, "room", None)
    (keys, values), room = append(room, (state.k, state.v), (k.detach(), v.detach()))
    attention = decode if q.shape[2] <= MOST_DECODED else flash
    out, _ = attention(q.detach(), keys, values, causal=True, scale=scale, backend=backend)
    return out, State(keys, values, room)
