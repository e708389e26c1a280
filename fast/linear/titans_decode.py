"""Titans decoding: one token into the memory and out of it, as a few products of torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_attention_inputs,
    check_choice,
    check_integer,
    check_size,
    wide,
)
from attnspec.fast.linear.titans_checks import (
    READS,
    Layers,
    check_layers,
    check_scale,
    check_states,
    token_rates,
)
from attnspec.fast.linear.titans_memory import memory_grad, mlp_memory


class MemoryState(NamedTuple):
    """The gradient's weights, weights and momentum of every layer, float32 (batch, kv_heads,
    inputs, outputs), and how many tokens the current gradient chunk has.
    """

    W_base: Layers
    W: Layers
    S: Layers
    pos: int = 0


def decode_step(
    state: Any, q: Tensor, k: Tensor, v: Tensor, rates: tuple[Any, Any, Any], b: int, *,
    loss_scale: float = 2.0, read: str = "inclusive", backend: str | None = None,
) -> tuple[Tensor, MemoryState]:  # fmt: skip
    """y (batch, heads, 1, dv) of one new token, and a new state with it; nothing waits for the GPU.

    q (batch, heads, 1, d), k (batch, kv_heads, 1, d), v (batch, kv_heads, 1, dv), rates of one
    token. Computed in float32. Differentiable.
    """
    check_attention_inputs(q, k, v, FLOATS)
    check_size("q", q.shape[2], 1, "one token")
    check_size("k", k.shape[2], 1, "one token")
    check_integer("b", b, least=1)
    check_scale(loss_scale)
    check_choice("read", read, READS)
    _check_state(state, k, v)
    if state.pos > b:
        raise ValueError(f"state.pos: got {state.pos}, expected at most {b} (b)")
    theta, eta, alpha = (wide(x)[..., None] for x in token_rates(rates, k))
    W, S = (tuple(wide(x) for x in layers) for layers in (state.W, state.S))
    if state.pos in (0, b):
        base, pos = W, 0
    else:
        base, pos = tuple(wide(x) for x in state.W_base), state.pos
    H, Delta = memory_grad(base, wide(k), wide(v), loss_scale)
    gradients = [h.mT * e for h, e in zip(H, Delta, strict=True)]
    S = tuple(eta * s - theta * u for s, u in zip(S, gradients, strict=True))
    old = W
    W = tuple((1 - alpha) * w + s for w, s in zip(W, S, strict=True))
    queries = wide(q).reshape(*k.shape[:2], -1, q.shape[3])
    y = mlp_memory(old if read == "exclusive" else W, queries)
    return y.reshape(*q.shape[:3], -1).to(q.dtype), MemoryState(base, W, S, pos + 1)


def _check_state(state: Any, k: Tensor, v: Tensor) -> None:
    if not all(hasattr(state, name) for name in MemoryState._fields):
        raise TypeError(f"state: got {type(state).__name__}, expected MemoryState")
    check_integer("state.pos", state.pos, least=0)
    check_layers("state.W", state.W, k, "k")
    check_size("v", v.shape[3], state.W[-1].shape[-1], "dv, the width of the last layer")
    try:
        check_states(state.W, state.S, k)
        check_states(state.W, state.W_base, k)
    except (TypeError, ValueError) as error:
        raise type(error)(f"state: {error}") from None
