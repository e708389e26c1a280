"""Giraffe on the flash and decode engines: queries and keys are turned, then it is dense.

Whatever the scheme, a position is a number and a frequency another: linear, power and truncated
scaling and random positions reach the kernels as rotated queries and keys, and cost them nothing.
The task generators write text and have no fast form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_bool,
    check_size,
    check_tensor,
)
from attnspec.fast.dense.attention import MOST_DECODED
from attnspec.fast.engines.decode import decode
from attnspec.fast.engines.flash import SPECIALISED_CONFIGS, flash
from attnspec.fast.engines.flash.checks import check_masks
from attnspec.fast.engines.rows import turn
from attnspec.fast.growing import Room, append, check_continues
from attnspec.fast.positions.giraffe_rotation import (
    check_frequencies,
    check_positions,
    check_width,
    positions,
    random_positions,
    rope_basis,
    rotate_half_split,
    rotate_interleaved,
)
from attnspec.fast.positions.giraffe_xpos import check_given, xpos, xpos_attend, xpos_scale

__all__ = [
    "CLAIMS",
    "State",
    "attend",
    "init_state",
    "positions",
    "random_positions",
    "rope_basis",
    "rotate_half_split",
    "rotate_interleaved",
    "step",
    "xpos",
    "xpos_attend",
    "xpos_scale",
]
ATTENTION: dict[str, Any] = {
    "gradient": True,
    "blocks": (16, 64),
    "triton": {"configs": SPECIALISED_CONFIGS},
}
CLAIMS: dict[str, dict[str, Any]] = {
    "rope_basis": {"launches": None},
    "positions": {"launches": None},
    "random_positions": {"launches": None, "dtypes": ("float32",)},
    "rotate_half_split": {"gradient": True},
    "rotate_interleaved": {"gradient": True},
    "xpos_scale": {"launches": None},
    "xpos": {"gradient": True},
    "xpos_attend": ATTENTION,
    "attend": ATTENTION,
}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pq: Tensor | None = None,
    pk: Tensor | None = None,
    f: Tensor | None = None,
    *,
    causal: bool = True,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, heads, T, dv) and lse (batch, heads, T), float32.

    q (batch, heads, T, d), k (batch, kv_heads, S, d), v (batch, kv_heads, S, dv), d even, not yet
    turned; `pq` (T) or (batch, T) and `pk` (S) or (batch, S), whole or real numbers, keys at 0..S-1
    and queries at the last T of them by default; `f` (d/2) on the device of q, by default those of
    `rope_basis`. Causal by index, aligned at the bottom right (K3); `key_mask` bool (batch, S),
    True = a real key. Differentiable in q, k, v.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_width("q", q.shape[3])
    check_given(q, k, pq, pk)
    if f is not None:
        check_frequencies(f, q)
    check_bool("causal", causal)
    check_masks(q, k, key_mask, None)
    turned, keys = turn(q, k, pq, pk, f, backend=backend)
    return flash(turned, keys, v, causal=causal, key_mask=key_mask, backend=backend)


class State(NamedTuple):
    """The turned keys (batch, kv_heads, tokens, d) and the values (batch, kv_heads, tokens, dv).

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
    p: Tensor,
    f: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs of new tokens at `p` (T) or (batch, T), and the state that includes them.

    q (batch, heads, T, d), k (batch, kv_heads, T, d), v (batch, kv_heads, T, dv), not yet turned;
    `f` (d/2) that of every step before. See `State`; for inference: there is no gradient.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("k", k.shape[2], q.shape[2], "tokens, as in q")
    check_continues(state, k, v)
    check_width("q", q.shape[3])
    check_positions("p", p, q)
    if f is not None:
        check_frequencies(f, q)
    with torch.no_grad():
        turned, new_keys = turn(q, k, p, p, f, backend=backend)
        room = getattr(state, "room", None)
        (keys, values), room = append(room, (state.k, state.v), (new_keys, v))
        attention = decode if q.shape[2] <= MOST_DECODED else flash
        out, _ = attention(turned, keys, values, causal=True, backend=backend)
    return out, State(keys, values, room)
