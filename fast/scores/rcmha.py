"""RCMHA on the relative engine and the filter engine.

The relative engine adds to the band of products with R a number for each distance, b, and one for
each key, u . k, so that one product with the queries serves both: scores (q + u) . k + q . R + b
need no second set of queries. The filters of q, k and v are one pass over memory each. Steps that
hand out whole matrices of scores, and the projections, are products of torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnspec.fast.backend import (
    FLOATS,
    check_choice,
    check_integer,
    check_same,
    check_size,
    check_tensor,
    product,
    wide,
)
from attnspec.fast.engines.filters import causal_filter
from attnspec.fast.engines.relative import relative
from attnspec.fast.growing import Room, append
from attnspec.fast.scores.rcmha_checks import (
    check_filters,
    check_heads,
    check_like,
    check_memory,
    check_tables,
)
from attnspec.fast.scores.rcmha_steps import (
    attend,
    content_scores,
    depthwise_causal_conv,
    memory_mask,
    project_heads,
    relative_scores,
    relative_shift,
    update_memory,
)

__all__ = [
    "State",
    "attend",
    "attend_segment",
    "content_scores",
    "depthwise_causal_conv",
    "init_state",
    "memory_mask",
    "project_heads",
    "relative_attention",
    "relative_scores",
    "relative_shift",
    "step",
    "update_memory",
]

CLAIMS: dict[str, dict[str, Any]] = {
    "relative_attention": {
        "gradient": True,
        "blocks": (16, 64),
        "compiled": True,
        "triton": {"graph": True},
    },
    "depthwise_causal_conv": {"gradient": True, "compiled": True, "triton": {"graph": True}},
    "attend_segment": {"gradient": True, "compiled": True},
    "step": {"compiled": True},
    **{
        name: {"launches": None}
        for name in (
            "project_heads", "content_scores", "relative_shift", "relative_scores", "memory_mask",
            "attend", "update_memory", "init_state",
        )
    },
}  # fmt: skip


class State(NamedTuple):
    """The last K - 1 rows before the filters, (batch, heads, K - 1, dk), and the filtered keys and
    values so far, with u . k of each key in float32 at least, (batch, heads, tokens).

    A step writes its tokens **in place** into the spare `room` behind them and returns a new state;
    the old one still sees its own tokens. A state goes with the filters and the u of one model.
    """

    q_rows: Tensor
    k_rows: Tensor
    v_rows: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None = None
    room: Room | None = None


def relative_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Outputs (batch, heads, T, dv) of filtered q, k and v, in linear memory.

    q (batch, heads, T, dk), k (batch, heads, S, dk), v (batch, heads, S, dv) with M = S - T >= 0
    tokens of memory first, dk and dv up to 256; R (2 P, heads, dk) and b (2 P, heads) with P >= S,
    u (heads, dk). Differentiable in all of them; u . k and b are kept in float32.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    check_heads("k", k, q)
    check_heads("v", v, q)
    T, S = q.shape[2], k.shape[2]
    check_size("k", k.shape[3], q.shape[3], "dk, as in q")
    if S < T:
        raise ValueError(f"k: got {S} tokens, expected at least the {T} of q")
    check_size("v", v.shape[2], S, "S tokens, as in k")
    check_like("u", u, q, (q.shape[1], q.shape[3]))
    check_tables(R, b, q, q.shape[1], q.shape[3], S)
    return _attend_keys(q, k, v, _key_bias(k, u), R, b, scale, causal, backend)


def _key_bias(k: Tensor, u: Tensor) -> Tensor:
    """u . k_j of the keys k (batch, heads, S, dk), (batch, heads, S), in float32 at least."""
    return product(wide(k), wide(u)[..., None])[..., 0]


def _attend_keys(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, R: Tensor, b: Tensor, scale: float | None,
    causal: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """`relative_attention` with u . k computed."""
    T, S, P = q.shape[2], k.shape[2], R.shape[0] // 2
    first, stop = P - max(S - 1, 0), P + (1 if causal else max(T, 1))
    return relative(
        q, k, v, R[first:stop].transpose(0, 1), zero=P - first, scale=scale, causal=causal,
        table_bias=wide(b[first:stop]).T, key_bias=key_bias, backend=backend,
    )[0]  # fmt: skip


def attend_segment(
    x: Tensor,
    memory: Tensor | None,
    W: Tensor,
    biases: Tensor,
    w: Tensor,
    c: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    q_conv_state: str = "reset",
    *,
    backend: str | None = None,
) -> Tensor:
    """A segment x (batch, T, D) after its memory (batch, M, D) or none, (batch, T, D).

    W (4, D, D) holds Wq, Wk, Wv and Wo, `biases` (2, D) those of v and of the output, w (3, dk, K)
    and c (3, dk) the filters of q, k and v; tables as in `relative_attention`. With `q_conv_state`
    "reset" the filters of q see zeros before the segment, with "carry" the memory. Differentiable.
    """
    check_tensor("x", x, ("batch", "T", "D"), FLOATS)
    check_tensor("u", u, ("heads", "dk"), FLOATS)
    (_, T, D), (heads, dk) = x.shape, u.shape
    check_like("W", W, x, (4, D, D))
    check_like("biases", biases, x, (2, D))
    check_same("u", u, "x", x)
    check_size("u", heads * dk, D, "heads times dk, as in x")
    check_filters(w, c, x, dk)
    check_choice("q_conv_state", q_conv_state, ("reset", "carry"))
    kvx = x
    if memory is not None:
        check_memory("memory", memory, x)
        kvx = torch.cat([memory, x], 1)
    check_tables(R, b, x, heads, dk, kvx.shape[1])
    source = kvx if q_conv_state == "carry" else x
    q, k, v = (
        causal_filter(
            project_heads(y, W[n], biases[0] if n == 2 else None, heads), w[n], c[n],
            backend=backend,
        )
        for n, y in enumerate((source, kvx, kvx))
    )  # fmt: skip
    o = relative_attention(q[:, :, q.shape[2] - T :], k, v, R, b, u, backend=backend)
    return product(o.transpose(1, 2).reshape(x.shape), W[3]) + biases[1]


def init_state(p: Tensor, K: int) -> State:
    """The state before the first token, for rows like p (batch, heads, T, dk) and `K` taps."""
    check_tensor("p", p, ("batch", "heads", "T", "dk"), FLOATS)
    check_integer("K", K, least=1)
    rows, cache = p.new_zeros(*p.shape[:2], K - 1, p.shape[3]), p[:, :, :0]
    return State(rows, rows.clone(), rows.clone(), cache.clone(), cache.clone())


@torch.no_grad()
def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    c: Tensor,
    R: Tensor,
    b: Tensor,
    u: Tensor,
    state: State,
    *,
    backend: str | None = None,
) -> tuple[Tensor, State]:
    """Outputs (batch, heads, T, dk) of T new tokens, and the state after them.

    q, k and v (batch, heads, T, dk) are projected and not yet filtered; w (3, dk, K) and c (3, dk)
    are their filters; the tables need P of at least all tokens so far. For inference: there is no
    gradient.
    """
    check_tensor("q", q, ("batch", "heads", "T", "dk"), FLOATS)
    for name, x in (("k", k), ("v", v)):
        check_like(name, x, q, tuple(q.shape))
    check_filters(w, c, q, q.shape[3])
    if not (isinstance(state, tuple) and hasattr(state, "v_rows")):
        raise TypeError(f"state: got {type(state).__name__}, expected a State")
    check_heads("state", state.k, q)
    check_like("state", state.v, q, tuple(state.k.shape))
    check_size("state", state.k.shape[3], q.shape[3], "dk, as in q")
    check_like("u", u, q, (q.shape[1], q.shape[3]))
    check_tables(R, b, q, q.shape[1], q.shape[3], state.k.shape[2] + q.shape[2])
    (qf, q_rows), (kf, k_rows), (vf, v_rows) = (
        depthwise_causal_conv(x, w[n], c[n], rows, backend=backend)
        for n, (x, rows) in enumerate(zip((q, k, v), state[:3], strict=True))
    )
    # A state of another making has neither yet.
    key_bias, room = getattr(state, "key_bias", None), getattr(state, "room", None)
    old = (state.k, state.v, _key_bias(state.k, u) if key_bias is None else key_bias)
    (keys, values, key_bias), room = append(room, old, (kf, vf, _key_bias(kf, u)))
    out = _attend_keys(qf, keys, values, key_bias, R, b, None, True, backend)
    return out, State(q_rows, k_rows, v_rows, keys, values, key_bias, room)
